"""The teacher's requests through the Batch API: the same journal, the same rows, half the price at OpenAI.

    submit   sends what the journal lacks and no batch holds already
    status   asks how far the batches are
    fetch    takes the answers of finished batches into the journal

Ids are kept in a small file beside the journal. A batch is noted there before it is made, with a mark of its own in its
metadata. So where a run is killed, or a connection broken, between making a batch and learning its id, the next submit
finds it among the account's batches by its mark instead of paying for it again.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finqa.chat.answer_journal import Answer, AnswerJournal, Failure
from finqa.chat.chat_request import answer_from, as_sent, one_line, status_fault, status_kind
from finqa.chat.config import LimitName, api_key
from finqa.runtime.errors import UserError
from finqa.runtime.manifest import write_json
from finqa.runtime.paths import json_line
from preprocessing.teacher.config import NO_KEY, OpenAITeacherConfig
from preprocessing.teacher.conversation import Wanted

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types import Batch

REQUESTS_A_BATCH = 50_000
BYTES_A_BATCH = 200_000_000
"""The Batch API's limits of one file."""
FINISHED = ("completed", "failed", "expired", "cancelled")
MARK = "finqa_batch"
"""Name of the mark in a batch's metadata."""


@dataclass(frozen=True)
class BatchRecord:
    """A batch, as the file beside the journal has it."""

    mark: str
    requests: tuple[str, ...]
    """Custom ids: `<key>.<limit>` of each request."""
    model: str
    id: str = ""
    """Empty until the server has said it."""
    status: str = "validating"
    taken: bool = False
    """Whether its answers are in the journal."""


def batches_file(journal: Path) -> Path:
    return journal.with_name(journal.name.replace(".journal.jsonl", ".batches.json"))


def read_records(path: Path) -> list[BatchRecord]:
    """The batches of a journal; raises UserError where the file cannot be read."""
    if not path.exists():
        return []
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return [BatchRecord(**{**record, "requests": tuple(record["requests"])}) for record in fields]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is no list of batches ({error}); it says what was paid for: mend it by hand") from None


def write_records(path: Path, records: Iterable[BatchRecord]) -> None:
    write_json(path, [asdict(record) for record in records])


def under_way(path: Path) -> set[str]:
    """Keys of the requests in batches whose answers are still to be fetched."""
    return {name.partition(".")[0] for record in read_records(path) if not record.taken for name in record.requests}


def split_into_files(
    wanted: Iterable[Wanted],
    most_requests: int = REQUESTS_A_BATCH,
    most_bytes: int = BYTES_A_BATCH,
    limit_name: LimitName = "max_completion_tokens",
) -> Iterator[tuple[tuple[str, ...], bytes]]:
    """The requests as JSONL files within the limits: the custom ids and the content of each."""
    names: list[str] = []
    content = bytearray()
    for one in wanted:
        name = f"{one.key}.{one.limit}"
        body = as_sent(one.request, limit_name)
        line = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
        data = json_line(line).encode()
        if names and (len(names) >= most_requests or len(content) + len(data) > most_bytes):
            yield tuple(names), bytes(content)
            names, content = [], bytearray()
        names.append(name)
        content += data
    if names:
        yield tuple(names), bytes(content)


class Batches:
    """The batches of one journal, which takes their answers and whose lock covers the file of batches too."""

    def __init__(self, config: OpenAITeacherConfig, journal: AnswerJournal) -> None:
        self.config = config
        self.journal = journal
        self.path = batches_file(journal.path)
        self.records = read_records(self.path)

    def submit(self, wanted: Sequence[Wanted], most_requests: int = REQUESTS_A_BATCH) -> list[BatchRecord]:
        """Make batches of the requests, and return them. Those in a batch under way must not be among them."""
        made: list[BatchRecord] = []
        with self._client() as client:
            for names, content in split_into_files(wanted, most_requests, limit_name=self.config.limit_name):
                with self._one_line("uploading the requests"):
                    file = client.files.create(file=(f"{self.path.stem}.jsonl", content), purpose="batch")
                record = BatchRecord(mark=uuid.uuid4().hex, requests=names, model=self.config.model)
                self._save(record)
                made.append(self._create(client, file.id, record))
        return made

    def find_unnamed(self) -> None:
        """Learn the ids of batches that were made without an answer coming back, and forget those that never were."""
        unnamed = {record.mark: record for record in self.records if not record.id}
        if not unnamed:
            return
        with self._client() as client, self._one_line("looking for a batch whose id never came"):
            found = {(batch.metadata or {}).get(MARK, ""): batch for batch in client.batches.list()}
        for mark, record in unnamed.items():
            self.records.remove(record)
            if mark in found:
                self.records.append(replace(record, id=found[mark].id, status=found[mark].status))
        write_records(self.path, self.records)

    def look(self) -> list[tuple[BatchRecord, Batch]]:
        """Every batch that is not taken yet, as the server has it now."""
        self.find_unnamed()
        looked: list[tuple[BatchRecord, Batch]] = []
        with self._client() as client:
            for record in [record for record in self.records if not record.taken]:
                with self._one_line(f"asking about batch {record.id}"):
                    batch = client.batches.retrieve(record.id)
                looked.append((self._save(replace(record, status=batch.status)), batch))
        return looked

    def take(self, record: BatchRecord, batch: Batch) -> list[Answer]:
        """Put what a finished batch gave into the journal; returns the answers that are new there."""
        new: list[Answer] = []
        waiting = set(record.requests)
        with self._client() as client:
            for file in filter(None, (batch.output_file_id, batch.error_file_id)):
                with self._one_line(f"fetching {file} of batch {batch.id}"):
                    content = client.files.content(file).content
                for line in content.decode(errors="replace").split("\n"):  # splitlines ends at U+2028 too
                    name, outcome = read_line(line, record.model, batch.id)
                    if name in waiting:
                        waiting.remove(name)
                        new += self._keep(name, outcome)
        for name in sorted(waiting):
            self._keep(name, Failure(f"teacher-batch-{batch.status}", reason(batch)))
        self._save(replace(record, taken=True, status=batch.status))
        return new

    def _keep(self, name: str, outcome: Answer | Failure) -> list[Answer]:
        key, _, limit = name.partition(".")
        if isinstance(outcome, Failure):
            self.journal.add_failure(key, outcome)
            return []
        there = self.journal.answer(key)
        if there is not None and (there.batch, there.limit) == (outcome.batch, int(limit)):
            return []  # A fetch before this one was killed halfway.
        self.journal.add_answer(key, outcome)
        return [outcome]

    def _create(self, client: OpenAI, file: str, record: BatchRecord) -> BatchRecord:
        import openai

        try:
            batch = client.with_options(max_retries=0).batches.create(
                input_file_id=file,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                metadata={MARK: record.mark},
            )
        except openai.APIError as error:
            if isinstance(error, openai.APIStatusError) and error.status_code < 500 and error.status_code != 408:
                self.records.remove(record)  # It was refused: there is none.
                write_records(self.path, self.records)
                raise UserError(f"the server makes no batch: {one_line(error)}") from error
            raise UserError(
                f"whether the batch was made is not known ({one_line(error)}); give the same command again: it looks "
                "for the batch first"
            ) from error
        return self._save(replace(record, id=batch.id, status=batch.status))

    def _save(self, record: BatchRecord) -> BatchRecord:
        marks = [there.mark for there in self.records]
        if record.mark in marks:
            self.records[marks.index(record.mark)] = record
        else:
            self.records.append(record)
        write_records(self.path, self.records)
        return record

    def _client(self) -> OpenAI:
        from openai import OpenAI

        return OpenAI(
            api_key=api_key(NO_KEY),
            base_url=self.config.base_url,
            max_retries=5,
            timeout=max(60.0, self.config.timeout_s),
        )

    @contextlib.contextmanager
    def _one_line(self, what: str) -> Iterator[None]:
        import openai

        try:
            yield
        except openai.APIStatusError as error:
            if error.status_code == 404:
                raise UserError(
                    f"{what}: not found; is it the same server and account, and has it a Batch API? {one_line(error)}"
                ) from error
            fault = status_fault(error, self.config.model, str(self.config.base_url))
            raise UserError(f"{what} failed: {fault.failure.message}") from error
        except openai.APIError as error:
            raise UserError(f"{what} failed: {one_line(error.__cause__ or error)}; try again") from error


def read_line(line: str, asked: str, batch: str) -> tuple[str, Answer | Failure]:
    """The custom id of a line of an output or error file, and what it says. An unreadable line has no id."""
    try:
        fields: dict[str, Any] = json.loads(line)
        name = fields["custom_id"]
        limit = int(name.partition(".")[2])
    except (ValueError, TypeError, KeyError, AttributeError):
        return "", Failure("teacher-malformed", one_line(line)[:200])
    error, response = fields.get("error"), fields.get("response")
    if not isinstance(response, dict):
        code = str(error.get("code") or "error") if isinstance(error, dict) else "error"
        kind = code if code in ("batch_expired", "batch_cancelled") else "batch_error"
        return name, Failure(f"teacher-{kind.replace('_', '-')}", one_line(error))
    status = response.get("status_code")
    if status != 200:
        return name, Failure(status_kind(status if isinstance(status, int) else 500), one_line(response.get("body")))
    return name, answer_from(response.get("body"), limit, asked, batch)


def reason(batch: Batch) -> str:
    """How a batch stands, with what the server says about it."""
    # The client builds its objects from whatever a compatible server sends.
    errors: Any = getattr(batch.errors, "data", None) or batch.errors or []
    several = errors[:3] if isinstance(errors, list) else [errors]
    said = "; ".join(one_line(f"{one.code}: {one.message}" if hasattr(one, "message") else one) for one in several)
    return f"batch {batch.id} is {batch.status}{': ' + said if said else ''}"
