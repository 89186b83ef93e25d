"""Says what came of the runs of tests/faults.sh: a table for each server and mode, then one in Markdown of all.

    faults.py CASES RESULTS CIRCUMSTANCES

CASES has a line of fault, server and mode for each case; RESULTS one for each run, as tests/faults.sh writes it.
Exit code 1 if a promise was broken, 2 if none was and some case was not reached.
"""

import sys


class Case:
    """What came of all runs of one case."""

    def __init__(self):
        self.runs = self.broken = self.limit_s = self.events = self.redelivered = self.admitted = 0
        self.recovered_s = 0.0

    def add(self, verdict, recovered_s, limit_s, events, redelivered, admitted):
        self.runs += 1
        self.broken += verdict != "kept"
        self.recovered_s = max(self.recovered_s, float(recovered_s))
        self.limit_s = max(self.limit_s, int(limit_s))
        self.events += int(events)
        self.redelivered += int(redelivered)
        self.admitted += int(admitted)

    def verdict(self):
        if self.runs == 0:
            return "not reached"
        return f"broken in {self.broken}" if self.broken else "kept"

    def cell(self):
        """The case in the Markdown table."""
        if self.broken or self.runs == 0:
            return f"**{self.verdict()}**"
        twice = f", {self.admitted} twice" if self.admitted else ""
        return f"{self.runs}, {self.recovered_s:.1f} s{twice}"


def read(cases_path, results_path):
    with open(cases_path, encoding="utf-8") as lines:
        cases = {tuple(line.split()): Case() for line in lines}
    with open(results_path, encoding="utf-8") as lines:
        for line in lines:
            fault, server, mode, _took_s, *result = line.split()
            cases[fault, server, mode].add(*result)
    return cases


def print_part(cases, server, mode):
    """All cases of one server and mode, each with everything that was counted."""
    print(f"nats-server {server}, {mode}")
    columns = "  {:<44} {:>4}  {:<12} {:>9} {:>6} {:>8} {:>11} {:>8}"
    print(columns.format("fault", "runs", "verdict", "recovered", "limit", "events", "redelivered", "admitted"))
    for (fault, *where), case in sorted(cases.items()):
        if where == [server, mode]:
            recovered, limit = f"{case.recovered_s:.1f} s", f"{case.limit_s} s"
            counts = case.events, case.redelivered, case.admitted
            print(columns.format(fault, case.runs, case.verdict(), recovered, limit, *counts))
    print()


def print_markdown(cases, parts, circumstances):
    runs = sum(case.runs for case in cases.values())
    events = sum(case.events for case in cases.values())
    broken = sum(case.broken for case in cases.values())
    verdict = f"{broken} broke a promise" if broken else "every promise was kept"
    print(f"{circumstances} {runs} runs, {events:,} events, {verdict}.")
    print("Each cell: runs, longest time until it was back at work, events that were stored twice as the design admits.\n")
    print(f"| fault | limit | {' | '.join(f'{server} {mode}' for server, mode in parts)} |")
    print(f"|---|---|{'---|' * len(parts)}")
    for fault in sorted({fault for fault, _, _ in cases}):
        tried = [cases.get((fault, *part)) for part in parts]
        limit_s = max(case.limit_s for case in tried if case)
        cells = [case.cell() if case else "" for case in tried]
        print(f"| {fault.replace('_', ' ')} | {limit_s} s | {' | '.join(cells)} |")
    print()


def main():
    cases_path, results_path, circumstances = sys.argv[1:]
    cases = read(cases_path, results_path)
    parts = sorted({(server, mode) for _, server, mode in cases}, key=lambda part: (part[0] != "2.9", part[1] != "singly"))
    for part in parts:
        print_part(cases, *part)
    print_markdown(cases, parts, circumstances)
    missed = sum(case.runs == 0 for case in cases.values())
    if missed:
        print(f"{missed} of {len(cases)} cases were not reached: give them more minutes, or more jobs")
    if any(case.broken for case in cases.values()):
        return 1
    return 2 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
