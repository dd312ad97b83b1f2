"""Speculative decoding (arXiv 2211.17192): one drafts, the model verifies several tokens in one call."""

from dataclasses import dataclass
from typing import Any, ClassVar

from .base import Guarantee, Request
from .draft_and_verify import DraftAndVerify
from .speculative.acceptance import AcceptanceRule, RejectionSampling
from .speculative.adaptive_ngram import AdaptiveNGram
from .speculative.drafters import Drafter, resolve_drafter
from .speculative.dynamic_tree import DynamicTree
from .speculative.ngram import NGram
from .speculative.opt_tree import OptTree
from .speculative.spectr import SpecTr
from .speculative.trees import Tree
from .token_loop import check_give_up_below

PARTS = (
    AdaptiveNGram,
    NGram,
    RejectionSampling,
    DynamicTree,
    OptTree,
    SpecTr,
)  # imported, so that they are known by name


@dataclass
class SpeculativeDecoding(DraftAndVerify):
    """
    Drafts a tree of tokens, feeds it to the model in one call and keeps the path that the acceptance rule admits and one
    token more. Greedy output is that of the model alone; samples follow its distribution, unless the rule is a relaxed
    one (`TypicalAcceptance`).

    Args:
        drafter: who drafts: a model (a small language model, `MedusaHeads`, `Eagle`), or `NGram`, `DraftModel`,
            `MedusaDrafter`, `EagleDrafter`, their name or stored dict; default: `NGram`.
        tree: how drafts are arranged: `Chain`, `IndependentSequences`, `StaticTree`, `DynamicTree`, `OptTree`; default:
            what fits the drafter.
        acceptance: which drafts stay: `RejectionSampling`, `ExactMatch`, `SpecTr`, `TypicalAcceptance`; default: the
            first.
        give_up_below: after the first 16 calls, a request whose rows gain fewer tokens a call than this goes on without
            drafts; default: never.
    """

    drafter: Any = None
    tree: Any = None
    acceptance: Any = None
    give_up_below: float | None = None

    guarantee: ClassVar[Guarantee] = Guarantee.EXACT_IN_DISTRIBUTION
    can_compile: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.drafter = None if self.drafter is None else resolve_drafter(self.drafter)
        self.tree = None if self.tree is None else Tree.resolve(self.tree)
        self.acceptance = None if self.acceptance is None else AcceptanceRule.resolve(self.acceptance)
        check_give_up_below(self.give_up_below)
        rule, tree = self.acceptance_part(), self.tree_part()
        if rule.guarantee is Guarantee.RELAXED:
            self.guarantee, self.knob = rule.guarantee, "acceptance"
        if rule.needs_independent and not tree.independent:
            raise ValueError(
                f"{type(rule).__name__} needs drafts that are drawn independently, which those of {type(tree).__name__} "
                "are not; use tree=IndependentSequences() or Chain(), or acceptance=RejectionSampling()."
            )

    def drafting_part(self) -> Drafter:
        return NGram() if self.drafter is None else self.drafter

    def tree_part(self) -> Tree:
        return self.drafting_part().default_tree() if self.tree is None else self.tree

    def acceptance_part(self, request: Request | None = None) -> AcceptanceRule:
        return RejectionSampling() if self.acceptance is None else self.acceptance
