"""Tasks over whole conversations: lm-eval's own know one question and one answer.

Every score is a mean over held-out rows, so lm-eval gives each a standard error.
"""

import math

from lm_eval.api.task import ConfigurableTask


class Conversation(ConfigurableTask):
    """Ask for the last answer of doc["messages"] or doc["chosen"], after all turns before it."""

    def __init__(self, config):
        # lm-eval hands its own key on, which its own TaskConfig refuses.
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def fewshot_context(self, doc, *arguments, chat_template=None, **keywords):
        """Render the turns before the last by the model's chat template."""
        self.tokenizer = chat_template.__self__.tokenizer  # of the model that is evaluated
        return chat_template((doc.get("messages") or doc["chosen"])[:-1])


class Answers(Conversation):
    """Score a held-out answer by how likely the model finds it."""

    def process_results(self, doc, results):
        """Return nats a token, bits a byte, and whether greedy decoding gives the very answer."""
        (nats, exact), answer = results[0], doc["messages"][-1]["content"]
        tokens = self.tokenizer.encode(answer, add_special_tokens=False)
        return {
            "loss": -nats / max(1, len(tokens)),
            "bits_per_byte": -nats / math.log(2) / len(answer.encode()),
            "exact_match": float(exact),
        }


def another_question(rows):
    """Give each row the turns before the answer of the next one: what of the score is style alone,
    the answer's own likelihood after whatever was asked."""
    turns = rows["messages"]

    def swap(row, index):
        others = turns[(index + 1) % len(turns)]
        return {"messages": [*others[:-1], row["messages"][-1]]}

    return rows.map(swap, with_indices=True)


class Pairs(Conversation):
    """Score a held-out pair by which answer the model finds likelier."""

    def process_results(self, doc, results):
        """`results` is [(log-likelihood, is greedy)] of the chosen and the rejected answer, in
        nats."""
        chosen, rejected = results[0][0], results[1][0]
        return {"margin": chosen - rejected, "prefers_chosen": float(chosen > rejected)}


def document(doc, results):
    """Return a document's bits a byte: summed over all documents, and as a mean of documents, which
    has a standard error."""
    size = len(doc["text"].encode())
    return {
        "bits_per_byte": (results[0], size),
        "document_bits_per_byte": -results[0] / math.log(2) / size,
    }
