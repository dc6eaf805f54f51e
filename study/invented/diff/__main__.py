"""One step of the second half, on one fine-tune; the jobs of python -m study.invented run it.

    python -m study.invented.diff ceilings A-seed3 --model M     right answers of whole-site patches
    python -m study.invented.diff record K-seed3 --model M       activations at the primary site
    python -m study.invented.diff look A-seed3 --model M         what the test's questions give there
    python -m study.invented.diff settings K-seed3 L1 --model M  settings of a method, chosen on it
    python -m study.invented.diff dictionaries A-seed3 L1 --model M  a method's dictionaries at the primary site
    python -m study.invented.diff diff A-seed3 L1 --model M      a method's items and carrying at the primary site, and
                                                                 dictionaries that are not trained yet
    python -m study.invented.diff seeds A-seed3 --model M        dictionaries of further seeds, and items, after that
    python -m study.invented.diff sites A-seed3 --model M        dictionaries and items at the other sites

Reads the rows and adapters of D/invented/<model>/ and writes R/invented/<model>/{ceilings,diff}/. What is there is not
made again; activations are deleted when all that reads them is there.
"""

from __future__ import annotations

import argparse
import sys

from finqa.runtime.errors import report_errors
from study.invented.diff.plan import BASELINES, BY_RUN, METHODS, lengths, sites, slug
from study.invented.plan import add_plan_flags, plan_from

STEPS = ("ceilings", "record", "look", "settings", "dictionaries", "diff", "seeds", "sites")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m study.invented.diff", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("run", choices=list(BY_RUN), metavar="RUN", help="a fine-tune, such as A-seed3")
    methods = {slug(method): method for method in METHODS}
    parser.add_argument(
        "method", nargs="?", choices=[*methods, BASELINES], metavar="METHOD",
        help=f"one method alone, or of diff the {BASELINES}",
    )  # fmt: skip
    add_plan_flags(parser)
    args = parser.parse_args()
    if args.method == BASELINES and args.step != "diff":
        parser.error(f"{BASELINES} are read by diff")
    method = methods.get(args.method, args.method or "")
    plan, compared = plan_from(args), BY_RUN[args.run]
    from study.invented.diff import ceilings, dictionaries, pairs

    if args.step == "ceilings":
        print(ceilings.measure_ceilings(plan, compared))
        return
    primary = ceilings.primary_site(plan)
    if args.step in ("record", "look"):
        print((pairs.record if args.step == "record" else pairs.look)(plan, compared, primary))
        return
    if args.step in ("settings", "dictionaries"):
        make = dictionaries.choose_settings if args.step == "settings" else pairs.train
        for one in [method] if method else METHODS:
            print(make(plan, compared, primary, one), flush=True)
        return
    others = [target for target in sites(plan).values() if target != primary][: lengths(plan).other_sites]
    for target in others if args.step == "sites" else [primary]:
        print(pairs.compare(plan, compared, target, args.step, method), flush=True)


if __name__ == "__main__":
    sys.exit(report_errors(main))
