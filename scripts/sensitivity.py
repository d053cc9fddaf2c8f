"""Prints a sweep's dependence on the learning rate: loss and entropy by arm and rate, and the rates that train.

    python scripts/sensitivity.py --workdir runs/stability_vit

A loss is the mean of the last tenth of the logged training losses; an entropy is the lowest of any layer at any step of a
run. Both are given as median over seeds (lowest to highest). An arm trains at the rates where its loss is within 10 % of
the best of any arm; the next column has the rates within 10 % of the arm's own best. Sensitivity is the mean over rates of
the loss, capped at the first loss, minus the arm's best loss (Wortsman et al., 2023).
"""

import math
import statistics

from absl import flags

from sigmarep import command

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep.")


def main() -> None:
    workdir = command.required("workdir", WORKDIR.value)
    from sigmarep.diagnostics import sensitivity

    table = sensitivity.read_sweep(workdir)
    rates = sorted({rate for by_rate in table.values() for rate in by_rate})

    def cell(each: list[sensitivity.RunOutcome], name: str) -> str:
        diverged = sum(math.isinf(one.loss) for one in each)
        if name == "loss" and diverged:
            return f"{diverged} of {len(each)} diverged"
        values = [value for one in each if not math.isnan(value := getattr(one, name))]
        return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else ""

    for name, title in (("loss", "loss, nats"), ("lowest", "lowest entropy, nats")):
        print(f"| {title} | {' | '.join(f'{rate:g}' for rate in rates)} |\n|---{'|---' * len(rates)}|")
        for arm, by_rate in table.items():
            print(f"| {arm} | {' | '.join(cell(by_rate.get(rate, []), name) for rate in rates)} |")
        print()
    print("| arm | best loss, at | trains at | of its own best | sensitivity | lowest entropy |")
    print("|---|---|---|---|---|---|")
    for row in sensitivity.findings(table):
        print(
            f"| {row['arm']} | {row['loss']:.3f}, {row['rate']:g} | {sensitivity.in_words(row['range'])} "
            f"| {sensitivity.in_words(row['own'])} | {row['sensitivity']:.3f} | {row['entropy']:.3f} nats |"
        )


if __name__ == "__main__":
    command.run(main)
