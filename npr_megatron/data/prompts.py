"""The one prompt template: every stage, engine and measurement asks in the same words.

Models with a chat template get a single user turn: the question, a blank line, the instruction
(spec: npr.md 1.2). Models without one (the sums task) get the bare question and a newline; they
have learnt the form from demonstrations.
"""

from __future__ import annotations

from collections.abc import Sequence

from npr_megatron.data.problems import Problem
from npr_megatron.data.tokenizer import Tokenizer
from npr_megatron.errors import InputError

INSTRUCTION = """\
Solve the problem in rounds of parallel work. Follow this format exactly; anything else is wrong.

Each round has three parts:
- <guideline> lists one to five numbered plans. A <plan> is one sentence that names a piece of work
which can be done without the others. Several plans are better than one.
- Then comes exactly one <step> per plan, with the same number and in the same order. Write each
step as if the other steps did not exist: it knows the problem, the earlier rounds and its own plan.
- <takeaway> compares and combines what the steps found, without new computation, and decides
whether another round is needed.

Put nothing but newlines between the tags, use no code fences, and never put one round inside
another. Avoid words that order the steps, such as first, next or finally. After the last takeaway
write a conclusion for the reader and give the short final answer in \\boxed{}.

The skeleton of a response with two rounds:

<guideline>
<plan>1: one independent piece of work</plan>
<plan>2: another independent piece of work</plan>
</guideline>
<step>
1: the work of plan 1 in full</step>
<step>
2: the work of plan 2 in full</step>
<takeaway>
What the steps found together, and what is still open.</takeaway>
<guideline>
<plan>1: a check or a continuation</plan>
</guideline>
<step>
1: the work of this plan in full</step>
<takeaway>
The problem is solved.</takeaway>
The conclusion, ending in \\boxed{the answer}"""


class PromptBuilder:
    """Turns problems into prompt ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def prompt_ids(self, problem: Problem) -> tuple[int, ...]:
        """Return the ids up to where the response begins; the instruction brings tags along."""
        return self.conversation_ids([("user", problem.question)])

    def conversation_ids(self, turns: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        """Return the ids of turns (role, text) whose last one asks; the instruction stands in it.

        Raises:
            InputError: the model knows no such conversation, or a character has no token.
        """
        *earlier, (role, question) = turns
        if self._tokenizer.has_chat_template:
            asking = (role, f"{question}\n\n{INSTRUCTION}")
            return tuple(self._tokenizer.encode_turns([*earlier, asking]))
        if earlier:
            raise InputError(
                f"a conversation of {len(turns)} turns was asked about; the model has no chat "
                "template and answers single questions; send one user turn"
            )
        return tuple(self._tokenizer.encode(f"{question}\n"))
