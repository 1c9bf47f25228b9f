"""The metrics of relay_preference: lm-eval has none for a pair of answers."""


def process_results(doc, results):
    """`results` is [(log-likelihood, is greedy)] of the chosen and the rejected answer, in nats."""
    chosen, rejected = results[0][0], results[1][0]
    return {"margin": chosen - rejected, "prefers_chosen": float(chosen > rejected)}
