"""What TAG and LAMP have in common: what they ask for, and what they refuse."""

from __future__ import annotations

from dataclasses import dataclass, field

from privfm.attacks.reconstruction.optimised.setting import Setting, Tokens, setting
from privfm.attacks.reconstruction.text_models import TextModel
from privfm.checks import InvalidArgument
from privfm.contracts import Observation, ReconstructionAttack


@dataclass(frozen=True, kw_only=True)
class OptimisedAttack(ReconstructionAttack):
    """Moves embeddings until their gradient is the observed one. The number of texts and their lengths must be known.

    | not declared      | what happens                                                                              |
    |-------------------|-------------------------------------------------------------------------------------------|
    | lengths           | of one text read off a position embedding's gradient; else refused                        |
    | examples          | as many as lengths                                                                        |
    | labels            | of one text read off the head's gradient; else optimised with the embeddings              |

    NaN entries and tensors that were not sent are not matched; neither is the token embedding's own gradient. Changes
    over several local steps are taken as one gradient, which is near enough under small learning rates.

    Args:
      first: token that the public tokenizer begins every text with; None: none.
      last: token that it ends every text with; None: none.
      vocabulary: ids that may occur between the two; None: all but these two and padding.
      embedding_gradient: look only for tokens whose row of the token embedding's gradient is not zero.
      architecture: how to read the model; None finds out.
    """

    first: int | None = None
    last: int | None = None
    vocabulary: tuple[int, ...] | None = field(default=None, repr=False)
    embedding_gradient: bool = False
    architecture: type[TextModel] | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        found = ("number of texts", "their lengths in tokens")
        return (*found, "token embedding's gradient") if self.embedding_gradient else found

    def refusal(self, observation: Observation) -> str:
        try:
            self._setting(observation)
        except InvalidArgument as reason:
            return str(reason)
        return ""

    def _setting(self, observation: Observation) -> Setting:
        tokens = Tokens(self.first, self.last, self.vocabulary, self.embedding_gradient)
        return setting(observation, tokens, self.architecture)
