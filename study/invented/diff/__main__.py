"""One step of the second half, on one fine-tune; the jobs of python -m study.invented run it.

    python -m study.invented.diff ceilings A-seed3 --model M     right answers of whole-site patches
    python -m study.invented.diff settings K-seed3 --model M     settings of every method, chosen on a control
    python -m study.invented.diff diff A-seed3 --model M         dictionaries, items, carrying at the primary site
    python -m study.invented.diff sites A-seed3 --model M        the same at the other sites

Reads the rows and adapters of D/invented/<model>/ and writes R/invented/<model>/{ceilings,diff}/. What is there is not
made again; activations are deleted when all that reads them is there.
"""

from __future__ import annotations

import argparse
import sys

from finqa.runtime.errors import report_errors
from study.invented.diff.plan import BY_RUN, lengths, sites
from study.invented.plan import add_plan_flags, plan_from

STEPS = ("ceilings", "settings", "diff", "sites")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m study.invented.diff", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("run", choices=list(BY_RUN), metavar="RUN", help="a fine-tune, such as A-seed3")
    add_plan_flags(parser)
    args = parser.parse_args()
    plan, compared = plan_from(args), BY_RUN[args.run]
    from study.invented.diff import ceilings, dictionaries, pairs

    if args.step == "ceilings":
        print(ceilings.measure_ceilings(plan, compared))
        return
    if args.step == "settings":
        print(dictionaries.choose_settings(plan, compared, ceilings.primary_site(plan)))
        return
    primary = ceilings.primary_site(plan)
    others = [target for target in sites(plan).values() if target != primary][: lengths(plan).other_sites]
    chosen = [primary] if args.step == "diff" else others
    for target in chosen:
        print(pairs.compare(plan, compared, target, is_primary=target == primary), flush=True)


if __name__ == "__main__":
    sys.exit(report_errors(main))
