"""The one prompt template: every stage, engine and measurement asks in the same words.

Models with a chat template get a single user turn: the question, a blank line, the instruction
(spec: npr.md 1.2). Models without one (the sums task) get the bare question and a newline; they
have learnt the form from demonstrations.
"""

from __future__ import annotations

from npr_megatron.data.problems import Problem
from npr_megatron.data.tokenizer import Tokenizer

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
        if self._tokenizer.has_chat_template:
            return tuple(self._tokenizer.encode_user_turn(f"{problem.question}\n\n{INSTRUCTION}"))
        return tuple(self._tokenizer.encode(f"{problem.question}\n"))
