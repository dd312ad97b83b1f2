"""The loop of all decodings in which one drafts and the model verifies."""

from abc import abstractmethod

import torch

from ..predictors.next_token import NextTokenPredictor
from ..transcript import Transcript, choose
from .base import DecodingResult, Request
from .speculative.acceptance import AcceptanceRule, Verdict
from .speculative.draft_tree import DraftContext, DraftTree
from .speculative.drafters import Drafter, Drafting
from .speculative.trees import Tree
from .token_loop import TokenLoop, drafting_loses


def depth_left(tree: Tree, drafting: Drafting, predictor: NextTokenPredictor, transcript: Transcript) -> int:
    """As deep as the tree may be, as the drafter can go, and as request and model have room beside a token more."""
    room = (transcript.remaining(), predictor.context_left())
    limits = (tree.most_depth, drafting.most_depth, *(one - 1 for one in room if one is not None))
    return min(limit for limit in limits if limit is not None)


class DraftAndVerify(TokenLoop):
    """Base of decodings that draft a tree of tokens, feed it to the model in one call, and keep what a rule accepts."""

    give_up_below: float | None

    @abstractmethod
    def drafting_part(self) -> Drafter:
        """Who drafts."""

    @abstractmethod
    def tree_part(self) -> Tree:
        """How drafts are arranged."""

    @abstractmethod
    def acceptance_part(self, request: Request) -> AcceptanceRule:
        """Which drafts stay."""

    @property
    def largest_draft(self) -> int:
        tree = self.tree_part()
        return 1 + max(tree.most_drafts, tree.most_expanded)

    def check(self, request: Request) -> None:
        super().check(request)
        self.drafting_part().check(request.model, self.tree_part())

    @torch.no_grad()
    def run(self, request: Request) -> DecodingResult:
        transcript, predictor = self.open(request), request.predictor
        drafter, tree, rule = self.drafting_part(), self.tree_part(), self.acceptance_part(request)
        context = DraftContext(transcript, bool(request.generation_config.do_sample), request.generator)
        drafter.prepare(request)
        logits = predictor.prefill(request.inputs)[:, None]
        drafting = drafter.open(request, context)
        lowest, highest = logits.aminmax()  # NaN if there is any
        scores = transcript.process(logits)
        transcript.note(scores)
        verdict = Verdict(choose(scores, context.do_sample, context.generator), [])
        drafting.accept(verdict, transcript.append(verdict.tokens, logits=logits, scores=scores))
        gains: list[list[int]] = []
        broken = torch.zeros((), dtype=torch.bool, device=logits.device)
        while not transcript.is_done:
            depth = depth_left(tree, drafting, predictor, transcript)
            if depth < 1 or drafting_loses(gains, self.give_up_below):
                drafts = DraftTree.none(verdict.tokens)
            else:
                drafts = tree.grow(drafting, context, depth)
                if drafts.probs is not None:
                    broken = broken | drafts.probs.isnan().any()
            fed = torch.cat([transcript.last(), drafts.tokens], dim=1)
            logits = predictor.predict(fed, drafts.fed_parents())
            low, high = logits.aminmax()
            lowest, highest = torch.minimum(lowest, low), torch.maximum(highest, high)
            scores = transcript.process(logits, drafts.tokens, drafts.parents)
            verdict = rule.verify(scores, drafts, context)
            kept = (verdict.along(one) if transcript.keeps else None for one in (logits, scores))
            taken = transcript.append(verdict.tokens, verdict.count, *kept)
            transcript.note(verdict.along(scores.amax(dim=-1, keepdim=True))[..., 0], taken)
            predictor.commit(verdict.kept_nodes(), taken)
            drafting.accept(verdict, taken)
            gains.append(taken)
        if bool(broken):
            raise ValueError(
                f"The drafter of {type(self).__name__} produced NaN: its weights are damaged, or too large for its dtype; "
                "load it again, in bfloat16 or float32."
            )
        lengths = torch.tensor(gains, dtype=torch.long).view(-1, transcript.batch_size).t()
        calls = predictor.calls + drafting.calls
        finite = torch.isfinite(lowest) & torch.isfinite(highest)
        result = self.result(request, transcript, len(gains) + 1, finite, calls, accept_lengths=lengths)
        result.has_nan = lowest.isnan()
        return result
