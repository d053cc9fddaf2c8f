"""Verifies two statements of the paper numerically: Theorem 3.1 (--what bound) and Proposition 3.2 (--what updates).

    python scripts/theory.py --what bound [--draws 300] [--plot bound.png]
    python scripts/theory.py --what updates [--plot updates.png]

bound: for T tokens and s = ‖W_K W_Qᵀ‖₂·‖X Xᵀ‖₂, the lower bound of attention entropy, the entropy of the extremal inputs
that attain it, and the lowest entropy of random inputs with the same s, whose logits are spread or concentrated.
updates: the spectral norm of an update of a w × w matrix under a constant gradient of rank one, with entries of size about
1, plus noise of relative size `noise`. The exponent is the slope of ln ‖Δ‖₂ over ln w.
A plot needs matplotlib: pip install "sigmarep[report]".
"""

from absl import flags

from sigmarep import command
from sigmarep.errors import BadInput

WHAT = flags.DEFINE_enum("what", "bound", ["bound", "updates"], "The statement to verify.")
DRAWS = flags.DEFINE_integer("draws", 300, "Number of random inputs for each T and s.", lower_bound=1)
PLOT = flags.DEFINE_string("plot", None, "File to draw a plot into.")
TOKENS = (2, 8, 64, 197)
SIGMAS = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
WIDTHS = (64, 128, 256, 512)
NOISES = (0.0, 0.3, 1.0, 3.0)
STEPS = 100


def extremal_entropy(tokens: int, sigma: float) -> float:
    """Entropy of the attention row that attains the bound.

    Here X = I and W_K W_Qᵀ = s·e₁wᵀ, where w is the unit vector of zero sum whose elements are equal except the first.
    """
    import numpy as np

    w = np.full(tokens, -1 / np.sqrt(tokens * (tokens - 1)))
    w[0] = np.sqrt((tokens - 1) / tokens)
    p = np.exp(sigma * w - np.max(sigma * w))
    p /= p.sum()
    return float(-np.sum(p[p > 0] * np.log(p[p > 0])))


def random_entropy(tokens: int, sigma: float, draws: int, seed: int = 0) -> float:
    """Lowest attention entropy of any row of `draws` random inputs whose logit operator has the norm `sigma`."""
    import numpy as np

    rng = np.random.default_rng(seed)
    lowest = np.inf
    for draw in range(draws):
        width = int(rng.integers(1, 17))
        # Few dominant directions concentrate the logits, many spread them.
        scales = np.exp(rng.normal(size=width) * (draw % 4))
        x = rng.normal(size=(tokens, width)) * scales
        w = rng.normal(size=(width, width)) * scales[:, None]
        operator = w / (np.linalg.norm(w, 2) * np.linalg.norm(x @ x.T, 2))
        logits = sigma * x @ operator @ x.T
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        entropies = -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), axis=1)
        lowest = min(lowest, float(entropies.min()))
    return lowest


def bound_table() -> list[tuple[int, float, float, float, float]]:
    from sigmarep.core.entropy import entropy_lower_bound

    return [
        (t, s, float(entropy_lower_bound(s, t)), extremal_entropy(t, s), random_entropy(t, s, DRAWS.value))
        for t in TOKENS
        for s in SIGMAS
    ]


def update_norms(width: int, noise: float) -> dict[str, float]:
    """‖Δ‖₂ of each optimizer's last update, divided by the learning rate, and the proposition's bound."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    import optax.contrib

    rng = np.random.default_rng(width)
    # Rank one; the entries have random signs and sizes around 1.
    mean = np.outer(*(rng.choice([-1.0, 1.0], width) * rng.uniform(0.5, 1.5, width) for _ in range(2)))
    spread = noise * np.mean(np.abs(mean))
    ideal = mean / np.sqrt(mean**2 + spread**2)
    bound = np.sqrt(width) * np.sqrt(1 - np.mean(spread**2 / (mean**2 + spread**2)))
    optimizers = {
        "SGD": optax.identity(),
        "Adam": optax.scale_by_adam(),
        "Muon": optax.contrib.scale_by_muon(weight_dimension_numbers={"w": optax.contrib.MuonDimensionNumbers()}),
    }
    norms = {"bound": float(bound), "ideal Adam": float(np.linalg.norm(ideal, 2))}
    for name, optimizer in optimizers.items():
        update = jax.jit(optimizer.update)
        params = {"w": jnp.zeros((width, width))}
        state = optimizer.init(params)
        for _ in range(STEPS):
            gradient = {"w": jnp.asarray(mean + spread * rng.normal(size=mean.shape), jnp.float32)}
            updates, state = update(gradient, state, params)
        norms[name] = float(np.linalg.norm(np.asarray(updates["w"], np.float64), 2))
    return norms


def figure(path: str, draw) -> None:
    """Writes a figure of one panel, which `draw(axes)` fills."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BadInput('--plot: needs matplotlib; pip install "sigmarep[report]"') from None
    drawn = Figure(figsize=(7, 4.5), layout="constrained")
    draw(drawn.add_subplot())
    try:
        drawn.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise BadInput(f"--plot {path}: cannot be written ({error})") from error
    print(f"plot: {path}")


def show_bound() -> None:
    rows = bound_table()
    print("| T | s | bound | extremal inputs | lowest of random inputs |\n|---|---|---|---|---|")
    for tokens, sigma, bound, extremal, lowest in rows:
        print(f"| {tokens} | {sigma:g} | {bound:.6f} | {extremal:.6f} | {lowest:.6f} |")
    below = sum(lowest < bound - 1e-5 for *_, bound, _, lowest in rows)
    apart = max(abs(bound - extremal) for *_, bound, extremal, _ in rows)
    print(f"\n{len(rows) * DRAWS.value} random inputs, {below} rows of the table below the bound")
    print(f"the extremal inputs attain the bound to {apart:.1e} nats")
    if not PLOT.value:
        return

    import numpy as np

    from sigmarep.core.entropy import entropy_lower_bound

    smooth = np.linspace(SIGMAS[0], SIGMAS[-1], 200)

    def draw(axes):
        for i, tokens in enumerate(TOKENS):
            lowest = [row[4] for row in rows if row[0] == tokens]
            axes.plot(smooth, entropy_lower_bound(smooth, tokens), color=f"C{i}", label=f"bound, T = {tokens}")
            axes.plot(SIGMAS, lowest, "o", color=f"C{i}", mfc="none", label="lowest random")
        axes.set(xlabel="s = ‖W_K W_Qᵀ‖₂·‖X Xᵀ‖₂", ylabel="attention entropy, nats")
        axes.legend(fontsize="small", ncols=2)

    figure(PLOT.value, draw)


def show_updates() -> None:
    import numpy as np

    table = {noise: {width: update_norms(width, noise) for width in WIDTHS} for noise in NOISES}
    print(
        f"| noise | norm of | {' | '.join(f'w = {w}' for w in WIDTHS)} | exponent |\n|---|---|{'---|' * (len(WIDTHS) + 1)}"
    )
    for noise, by_width in table.items():
        for name in by_width[WIDTHS[0]]:
            norms = [by_width[width][name] for width in WIDTHS]
            slope = np.polyfit(np.log(WIDTHS), np.log(norms), 1)[0]
            print(f"| {noise:g} | {name} | {' | '.join(f'{norm:.2f}' for norm in norms)} | {slope:.2f} |")
    if not PLOT.value:
        return

    def draw(axes):
        for i, name in enumerate(table[1.0][WIDTHS[0]]):
            norms = [table[1.0][width][name] for width in WIDTHS]
            axes.loglog(WIDTHS, norms, "k--" if name == "bound" else f"C{i}-o", label=name)
        axes.set(xlabel="width w", ylabel="‖Δ‖₂ of an update, noise 1")
        axes.legend()

    figure(PLOT.value, draw)


def main() -> None:
    {"bound": show_bound, "updates": show_updates}[WHAT.value]()


if __name__ == "__main__":
    command.run(main)
