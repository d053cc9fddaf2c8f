"""The words of a page, for readers who have not met them."""

WORDS = {
    "attention entropy": "How widely a layer's attention is spread, in nats, averaged over its heads: the "
    "logarithm of the number of positions if it looks at all alike, 0 if every query looks at one position.",
    "collapse": "A layer's entropy, the average over its heads, below 0.1 nats; a single head may be below it "
    "without. Almost all of every query's attention is then on one position; the run may diverge, or end with a worse "
    "result while its loss has no lasting rise.",
    "head": "One of the parallel attentions of a layer. The classifier at the end, also called head, is the "
    "output layer here.",
    "arm": "All runs of a comparison that differ in nothing but learning rate and seed.",
    "loss rose": "A lasting rise: the median of five logged losses exceeded the lowest one before by more than "
    "its usual change; a shorter bump is none.",
    "loss at the end": "The mean of the last tenth of the logged training losses: the one number by which runs are "
    "judged and ranked.",
    "recovered": "After a change on purpose: the loss at the end is not above that just before the change, the mean of up "
    "to three logged losses. Not set back: no loss logged after it is.",
    "diverged": "The loss was no finite number, or grew past divergence_factor times its start; 0 accepts any multiple.",
    "σ, spectral norm": "The largest factor by which a layer's matrix stretches a vector; of queries and keys it "
    "bounds how sharp attention can become at a given temperature.",
    "γ, effective norm": "σReparam trains W·γ/σ: a matrix whose spectral norm is |γ|, learned, whatever W is.",
    "stable rank": "Squared Frobenius norm over squared spectral norm: in how many directions a matrix acts.",
    "attention logit": "A product of a query and a key before the softmax; large ones make attention sharp.",
    "lower bound": "Theorem 3.1 of the σReparam paper: entropy is at least this, given the norms of inputs and "
    "weights.",
    "sharpness": "The largest eigenvalue of the loss's Hessian; above its threshold a step no longer descends.",
    "update / weight": "Norm of a step over norm of the weights that it changes.",
    "spikes": "Share of logged losses that are seven standard deviations off their running mean.",
    "sensitivity": "Mean over learning rates of the loss at the end, capped at the one logged at the start, minus the "
    "arm's lowest: lower is better.",
}
