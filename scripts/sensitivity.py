"""What a sweep says of the learning rate: final loss by arm and rate, and the range of rates in which each arm trains.

    python scripts/sensitivity.py --workdir runs/stability_vit

A loss is the mean of the last tenth of the logged training losses, the median over seeds (lowest to highest). An arm trains
where that is within 10 % of the best loss of any arm; beside it stands where it is within 10 % of the arm's own best. Its
sensitivity is the mean over rates of what its loss, cut at the start's, has above its best (Wortsman et al., 2023).
"""

import math

from absl import flags

from sigmarep import command

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep.")


def main() -> None:
    workdir = command.required("workdir", WORKDIR.value)
    from sigmarep.diagnostics import sensitivity

    table = sensitivity.read_sweep(workdir)
    rates = sorted({rate for by_rate in table.values() for rate in by_rate})
    print(f"| arm | {' | '.join(f'{rate:g}' for rate in rates)} |\n|---{'|---' * len(rates)}|")
    for arm, by_rate in table.items():
        cells = []
        for rate in rates:
            losses = sorted(each.loss for each in by_rate.get(rate, []))
            diverged = sum(map(math.isinf, losses))
            spread = f"{losses[len(losses) // 2]:.3f} ({losses[0]:.3f} to {losses[-1]:.3f})" if losses else ""
            cells.append(f"{diverged} of {len(losses)} diverged" if diverged else spread)
        print(f"| {arm} | {' | '.join(cells)} |")
    print("\n| arm | best loss, at | trains at | of its own best | sensitivity | lowest entropy |")
    print("|---|---|---|---|---|---|")
    for row in sensitivity.findings(table):
        print(
            f"| {row['arm']} | {row['loss']:.3f}, {row['rate']:g} | {sensitivity.said(row['range'])} "
            f"| {sensitivity.said(row['own'])} | {row['sensitivity']:.3f} | {row['entropy']:.3f} nats |"
        )


if __name__ == "__main__":
    command.run(main)
