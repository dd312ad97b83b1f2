"""The loop of all decodings in which one drafts and the model verifies."""

from abc import abstractmethod

import torch

from ..transcript import choose
from .base import DecodingResult, Request
from .speculative.acceptance import AcceptanceRule, Verdict
from .speculative.draft_tree import DraftContext, DraftTree
from .speculative.drafters import Drafter
from .speculative.trees import Tree
from .token_loop import TokenLoop, drafting_loses


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
        finite = torch.isfinite(logits).all()
        scores = transcript.process(logits)
        verdict = Verdict(choose(scores, context.do_sample, context.generator), [])
        drafting.accept(verdict, transcript.append(verdict.tokens, logits=logits, scores=scores))
        gains: list[list[int]] = []
        while not transcript.is_done:
            depth = min(tree.most_depth, transcript.remaining() - 1)
            if depth < 1 or drafting_loses(gains, self.give_up_below):
                drafts = DraftTree.none(verdict.tokens)
            else:
                drafts = tree.grow(drafting, context, depth)
            fed = torch.cat([transcript.last(), drafts.tokens], dim=1)
            logits = predictor.predict(fed, drafts.fed_parents())
            finite = finite & torch.isfinite(logits).all()
            scores = transcript.process(logits, drafts.tokens, drafts.parents)
            verdict = rule.verify(scores, drafts, context)
            kept = (verdict.along(one) if transcript.keeps else None for one in (logits, scores))
            taken = transcript.append(verdict.tokens, verdict.count, *kept)
            predictor.commit(verdict.kept_nodes(), taken)
            drafting.accept(verdict, taken)
            gains.append(taken)
        lengths = torch.tensor(gains, dtype=torch.long).view(-1, transcript.batch_size).t()
        calls = predictor.calls + drafting.calls
        return self.result(request, transcript, len(gains) + 1, finite, calls, accept_lengths=lengths)
