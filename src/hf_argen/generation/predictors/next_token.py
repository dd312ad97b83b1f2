"""Predictor of next-token models: one call feeds any number of tokens and predicts what follows each of them."""

from dataclasses import dataclass, field
from typing import Any

import torch

from ...kernels import tree_attention
from ..cache import PreallocatedCache
from ..guidance import Combiner, Guidance, PairedLogits, SoftCFG
from .base import Predictor
from .masks import Pattern, View, additive, additive_of_nodes, additive_on_host
from .tree import NodeTree


@dataclass
class Prompt:
    """
    What a model of ours reads before the first token.

    Attributes:
        embeds: (rows, length, hidden_size).
        mask: (rows, length), nonzero where there is no padding; `None` without padding.
        context: further tensors with one row each, handed to every call of `next_logits`.
    """

    embeds: torch.Tensor
    mask: torch.Tensor | None = None
    context: dict[str, torch.Tensor] = field(default_factory=dict)

    def paired_with(self, other: "Prompt") -> "Prompt":
        """Rows of this and then of another prompt of the same length."""
        mask = None
        if self.mask is not None or other.mask is not None:
            ones = self.embeds.new_ones(self.embeds.shape[:2], dtype=torch.bool)
            mask = torch.cat([ones if part is None else part.bool() for part in (self.mask, other.mask)])
        context = {name: torch.cat([value, other.context[name]]) for name, value in self.context.items()}
        return Prompt(torch.cat([self.embeds, other.embeds]), mask, context)


class NextTokenPredictor(Predictor):
    """
    Drives a model that has

    - `prompt(**inputs)` and `null_prompt(prompt)`: a [`Prompt`], conditional and unconditional;
    - `next_logits(input_ids= or inputs_embeds=, position_ids=, attention_mask=, past_key_values=, logits_to_keep=,
      **context)`: logits (rows, logits_to_keep, vocab_size) after each of the last tokens; `position_ids` (rows, n)
      count from the first position of the prompt;
    - `config.num_hidden_layers`, `config.num_image_tokens` (tokens of a picture), `neutral_guidance_scale`.

    Tokens that are fed become *nodes*: they stay apart from the sequence until `commit` says which of them it keeps.
    Each row of the cache is contiguous, and rows may be of unequal length.

    Args:
        model: the next-token model.
        guidance: strength of guidance at each token.
    """

    default_decoding = "next_token"

    def __init__(self, model: Any, guidance: Guidance):
        self.model = model
        self.guidance = guidance
        self.num_tokens = self.most_tokens()
        self.is_guided = not guidance.is_off(self.num_tokens)
        self.calls = 0
        self.capacity = self.num_tokens
        self.is_static = False
        self.widths: tuple[int, ...] = (1,)  # of compiled steps, see `compile_for`
        self._context: dict[str, torch.Tensor] = {}
        # With SoftCFG: how sure the conditional rows were of each token, (batch, tokens) float32, that of the next last.
        self._certainty: torch.Tensor | None = None

    # What differs between our families and the language models of transformers

    def most_tokens(self) -> int:
        """Tokens that the model can generate."""
        return self.model.config.num_image_tokens

    def context_left(self) -> int | None:
        """Positions for which the model was made that no row has reached; `None` for any number."""
        return None

    def num_layers(self) -> int:
        """Layers of the cache."""
        return self.model.config.num_hidden_layers

    def patterns(self) -> Pattern | dict[str, Pattern]:
        """What layers see of the past, by kind of layer where there are several."""
        return Pattern()

    def read_prompt(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Feeds the prompt, conditional rows first; logits (rows, 1, vocab_size)."""
        prompt: Prompt = self.model.prompt(**inputs)
        if self.is_guided:
            prompt = prompt.paired_with(self.model.null_prompt(prompt))
        rows, length = prompt.embeds.shape[:2]
        self.start(rows, length, None if prompt.mask is None else prompt.mask == 0, prompt.embeds.device)
        self._context = prompt.context
        mask = None
        if length > 1:
            seen = torch.ones(length, length, dtype=torch.bool, device=prompt.embeds.device).tril()[None]
            if self._hidden is not None:
                # Padding sees itself, so that no row of the softmax is empty.
                seen = (seen & ~self._hidden[:, None]) | torch.eye(
                    length, dtype=torch.bool, device=seen.device
                )
            mask = additive(seen.expand(rows, -1, -1), prompt.embeds.dtype)
        position = torch.arange(length, device=prompt.embeds.device).expand(rows, -1)
        return self.model.next_logits(
            inputs_embeds=prompt.embeds,
            position_ids=position,
            attention_mask=mask,
            past_key_values=self._cache,
            logits_to_keep=1,
            **self._context,
        )

    def feed(self, tokens: torch.Tensor, positions: torch.Tensor, needs_mask: bool) -> torch.Tensor:
        """Feeds tokens (rows, n) at their positions; logits (rows, n, vocab_size)."""
        needs_mask = needs_mask or tokens.shape[1] > 1 or self._hidden is not None or self.is_static
        self._cache.tree = None
        if needs_mask and self.goes_by_tree(tokens.shape[1]):
            needs_mask = False
            self._cache.tree = self.view(tokens.shape[1]).packed(len(tokens))
        return self.model.next_logits(
            input_ids=tokens,
            position_ids=positions.clamp(max=self._prompt_length + self.num_tokens - 1),
            attention_mask=self.mask(tokens.shape[1], self.model.dtype) if needs_mask else None,
            past_key_values=self._cache,
            logits_to_keep=tokens.shape[1],
            **self._context,
        )

    def goes_by_tree(self, n: int) -> bool:
        """Whether attention of n nodes takes a [`TreeView`] in place of a mask: where it is a kernel, or the model asks for it."""
        if not getattr(self.model, "reads_trees", False):
            return False
        implementation = self.model.config._attn_implementation
        if implementation in ("eager", "sdpa"):
            return tree_attention.runs_here(self._cache.layers[0].keys, n, self._columns())
        return implementation == "tree_attention"

    # What is the same

    def steps_for(self, max_new_tokens: int) -> int:
        """Steps of plain decoding: one per token."""
        if not 1 <= max_new_tokens <= self.num_tokens:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens}; this model draws pictures of {self.num_tokens} tokens, so it "
                f"must lie in [1, {self.num_tokens}]."
            )
        return max_new_tokens

    def reserve(self, tokens: int, is_static: bool = False) -> None:
        """
        Says before `prefill` how much memory to allocate.

        Args:
            tokens: the longest sequence and the largest draft beyond it.
            is_static: never grow, and let attention run over the whole memory, so that shapes and addresses stay.
        """
        self.capacity, self.is_static = tokens, is_static

    def for_model(self, model: Any) -> "NextTokenPredictor":
        """A predictor of another model for the same request."""
        other = type(self)(model, self.guidance)
        if self.steps is not None:
            other.compile(self.steps.config)
            other.compile_for(1, *self.widths)  # it feeds its own drafts one by one
        return other

    def why_not_compiled(self) -> str | None:
        return "SoftCFG weighs the past anew at every token" if self.is_soft else None

    def compile_for(self, *widths: int) -> None:
        """
        Says before `prefill` how many tokens compiled steps take: calls with fewer are filled up to the next of `widths`,
        so that there are as many graphs. Their capacity has to suffice for that.
        """
        self.widths = widths

    def prefill(self, inputs: dict[str, Any]) -> torch.Tensor:
        """
        Args:
            inputs: keywords of the model's `prompt`.

        Returns:
            guided logits of the first token (batch, vocab_size) float32.
        """
        return self.prefill_paired(inputs).guided()[:, 0]

    def prefill_paired(self, inputs: dict[str, Any]) -> PairedLogits:
        """As `prefill`, with guidance left to do; (rows, 1, vocab_size)."""
        logits = self.read_prompt(inputs)
        self._prompt_is_read()
        return self._pair(logits, torch.zeros(1, 1, dtype=torch.long, device=logits.device), 0)

    def _prompt_is_read(self) -> None:
        """What every way of reading a prompt ends with: from now on static memory is seen whole."""
        if self.is_static:
            self._cache.show_whole()
        if self.steps is not None:
            self._cache.fix_addresses()
        self.calls += 1

    def start(self, rows: int, prompt_length: int, hidden: torch.Tensor | None, device: torch.device) -> None:
        """An empty cache for a prompt of which `hidden` (rows, prompt_length) bool is padding."""
        self.batch_size = rows // 2 if self.is_guided else rows
        self._prompt_length, self._hidden = prompt_length, hidden
        capacity = prompt_length + self.capacity
        if self.steps is None:
            self._cache = PreallocatedCache(self.num_layers(), capacity, fixed=self.is_static)
        else:
            self.is_static = True
            capacity += max(self.widths)  # what fills calls up
            self._cache = self.steps.lend_cache(
                self, self.num_layers(), rows, capacity, self.model.dtype, device
            )
            self._is_met = False
        self._context = {}
        self._nodes = NodeTree()
        self._lengths = [0] * self.batch_size  # what `length` says, on the host
        self.length = torch.zeros(self.batch_size, dtype=torch.long, device=device)
        self.combine = self.combiner(device) if self.is_guided else None

    def combiner(self, device: torch.device) -> Any:
        """What guides logits."""
        return self.guidance.combiner(self.num_tokens, device)

    @property
    def is_soft(self) -> bool:
        """Whether drawn tokens guide, too; then tokens have to be fed one by one."""
        return self.is_guided and isinstance(self.guidance.factor, SoftCFG)

    def _weigh_values(self, n: int) -> None:
        """Scales the values of the drawn tokens, the one that is fed now included, in the unconditional rows."""
        if n != 1 or self._nodes.size != 1 or not self.is_even:
            raise ValueError(
                "SoftCFG weighs every token by how surely it was drawn, so tokens have to come one by one; use "
                "decoding='next_token', or another guidance_schedule."
            )
        weights = torch.ones(2 * self.batch_size, self._cache.capacity, device=self.length.device)
        drawn = slice(self._prompt_length, self._prompt_length + self._certainty.shape[1])
        weights[self.batch_size :, drawn] = self.guidance.factor.value_weights(self._certainty)
        self._cache.weigh_values(weights)

    @property
    def is_even(self) -> bool:
        """Whether all rows are of the same length."""
        return min(self._lengths) == max(self._lengths)

    def predict(self, tokens: torch.Tensor, parents: torch.Tensor | None = None) -> torch.Tensor:
        """
        Feeds tokens as new nodes. Nodes of earlier calls that were not committed stay and count.

        Args:
            tokens: (batch, n) int64.
            parents: (batch, n) int64, the node that each one continues, -1 for the committed sequence; a node comes
                after its parent. Default: a chain that continues the last node.

        Returns:
            guided logits (batch, n, vocab_size) float32 of what follows each token.
        """
        return self.predict_paired(tokens, parents).guided()

    def predict_paired(self, tokens: torch.Tensor, parents: torch.Tensor | None = None) -> PairedLogits:
        """As `predict`, with guidance left to do, unless a compiled step has done it; (rows, n, vocab_size)."""
        n, device = tokens.shape[1], tokens.device
        before = self._nodes.size
        self._nodes.grow(n, parents, self.batch_size, device)
        if self.steps is not None:
            self.calls += 1
            return PairedLogits(self._predict_compiled(tokens, before))
        if self.is_soft:
            self._weigh_values(n)
        is_chain = self.is_even and self._nodes.is_chain
        place, tokens = None, self._paired(tokens)
        if n == 1 and is_chain:  # plain decoding, where calls count
            place = self._lengths[0] + before + 1
            places = torch.full((1, 1), place, device=device)
            positions = (places + (self._prompt_length - 1)).expand(len(tokens), 1)
        else:
            places = self.length[:, None] + self._nodes.depths(n, device) + 1
            positions = self._paired((places + (self._prompt_length - 1)).expand(self.batch_size, -1))
        if not self.is_even:
            start = self.length[:, None] + self._prompt_length
            end = self._prompt_length + max(self._lengths) + before + n
            self._cache.expect(self._paired(start + torch.arange(before, before + n, device=device)), end)
        logits = self.feed(tokens, positions, not is_chain)
        self.calls += 1
        return PairedLogits(logits) if self.combine is None else self._pair(logits, places, place)

    def _predict_compiled(self, tokens: torch.Tensor, before: int) -> torch.Tensor:
        """`predict` after `before` nodes, by a graph that takes any tokens, lengths and trees."""
        n = tokens.shape[1]
        width = min((one for one in self.widths if one >= n), default=n)
        if not self._is_met:
            # All graphs that a request may need are there after its first step, whatever its drafts are like.
            self._is_met = True
            for other in self.widths:
                arguments = self._filled_up(tokens[:, :other], before, other)
                if other != width and not self.steps.knows(token_step, *arguments):
                    self.run(token_step, *arguments)
        return self.run(token_step, *self._filled_up(tokens, before, width))[:, :n]

    def _filled_up(self, tokens: torch.Tensor, before: int, width: int) -> tuple[Any, ...]:
        """The arguments of [`token_step`] for `width` tokens, of which those beyond `tokens` (batch, n) mean nothing."""
        n, device, size = tokens.shape[1], tokens.device, before + tokens.shape[1]
        room = max(*self.widths, width, self._nodes.size)
        filled = tokens.new_zeros(self.batch_size, width)
        filled[:, :n] = tokens
        seen = torch.zeros(self.batch_size, width, room, dtype=torch.bool, device=device)
        seen[:, :n, :size] = self._nodes.ancestors(self._nodes.size - before, device)[:, :n, :size]
        starts = self.length + self._prompt_length
        places = starts[:, None] + torch.arange(before, before + width, device=device)
        end = self._prompt_length + max(self._lengths) + before + width
        self._cache.expect(self._paired(places), end)
        last = self._prompt_length + self.num_tokens - 1
        strengths = self.combine.strengths if self.is_guided else None
        mask_of_prompt = (self._prompt_length, last, self._hidden, self._context)
        return self.model, self._cache, filled, starts, seen, strengths, *mask_of_prompt

    def mask(self, n: int, dtype: torch.dtype) -> torch.Tensor | dict[str, torch.Tensor]:
        """The additive mask (rows, 1, n, columns) of the last `n` nodes; one for each kind of layer."""
        rows = self.batch_size * (2 if self.is_guided else 1)
        patterns = self.patterns()
        if patterns == Pattern() and self.length.device.type == "cpu":
            starts = [self._prompt_length + length for length in self._lengths]
            ancestors = self._nodes.ancestors(n, self.length.device)
            return additive_on_host(starts, self._columns(), ancestors, self._hidden, rows, dtype)
        if patterns == Pattern() and self.is_even and self._hidden is None and not self.is_static:
            committed = self._prompt_length + self._lengths[0]
            return additive_of_nodes(committed, self._nodes.ancestors(n, self.length.device), rows, dtype)
        view = self.view(n)
        if isinstance(patterns, Pattern):
            return additive(view.visible(patterns, rows), dtype)
        return {kind: additive(view.visible(pattern, rows), dtype) for kind, pattern in patterns.items()}

    def _columns(self) -> int:
        """Places of the cache that attention looks at."""
        filled = self._prompt_length + max(self._lengths) + self._nodes.size
        return self._cache.capacity if self.is_static else filled

    def view(self, n: int) -> View:
        """What the last `n` nodes see."""
        return View(
            starts=self.length + self._prompt_length,
            columns=self._columns(),
            ancestors=self._nodes.ancestors(n, self.length.device),
            hidden=self._hidden,
        )

    def commit(self, keep: torch.Tensor | None = None, count: torch.Tensor | list[int] | None = None) -> None:
        """
        Makes nodes part of the sequence and forgets the others.

        Args:
            keep: (batch, k) int64, the nodes of each row in the order of the sequence, every one a child of the one
                before it; default: all nodes in their order.
            count: (batch,) how many of them each row keeps; default: all.
        """
        width = self._nodes.size if keep is None else keep.shape[1]
        if count is None:
            kept = [width] * self.batch_size
        else:
            kept = count.tolist() if isinstance(count, torch.Tensor) else count
        if keep is not None:
            self._move(keep, kept)
        self.length = self.length + (
            width if count is None else torch.as_tensor(count, device=self.length.device)
        )
        self._lengths = [length + more for length, more in zip(self._lengths, kept, strict=True)]
        self._nodes = NodeTree()
        self._cache.truncate(self._prompt_length + max(self._lengths))

    def _move(self, keep: torch.Tensor, count: list[int]) -> None:
        """Moves nodes `keep` (batch, k), `count` of each row, to where the committed positions of their rows end."""
        if keep.device.type == "cpu" or (len(keep) == 1 and not self.is_guided):
            for row, nodes in enumerate(keep):
                start = self._prompt_length + self._lengths[row]
                self._cache.pack(nodes[: count[row]] + start, start, row, self.batch_size)
        else:
            starts = (self.length + self._prompt_length)[:, None]
            target = starts + torch.arange(keep.shape[1], device=starts.device)
            self._cache.move(self._paired(starts + keep.clamp(min=0)), self._paired(target))

    def fork(self, n: int) -> None:
        self._select(torch.arange(self.batch_size, device=self.length.device).repeat_interleave(n))

    def drop(self, rows: torch.Tensor) -> None:
        keep = torch.ones(self.batch_size, dtype=torch.bool, device=self.length.device)
        keep[rows] = False
        self._select(keep.nonzero()[:, 0])

    def _select(self, rows: torch.Tensor) -> None:
        paired = torch.cat([rows, rows + self.batch_size]) if self.is_guided else rows
        self._cache.select_rows(paired)
        self._context = {name: value.index_select(0, paired) for name, value in self._context.items()}
        if self._hidden is not None:
            self._hidden = self._hidden.index_select(0, paired)
        if self._certainty is not None:
            self._certainty = self._certainty.index_select(0, rows)
        self._nodes.select_rows(rows)
        self.length = self.length.index_select(0, rows)
        self._lengths = [self._lengths[row] for row in rows.tolist()]
        self.batch_size = rows.numel()

    def _paired(self, value: torch.Tensor) -> torch.Tensor:
        """The same for the unconditional rows."""
        return value.repeat(2, *[1] * (value.ndim - 1)) if self.is_guided else value

    def _pair(self, logits: torch.Tensor, steps: torch.Tensor, place: int | None) -> PairedLogits:
        """Logits (rows, n, vocab_size) at the places `steps` (batch or 1, n) of the sequence: all at `place`, if that is one."""
        if self.combine is None:
            return PairedLogits(logits)
        if self.is_soft:
            sure = logits[: self.batch_size, -1:].float().softmax(dim=-1).amax(dim=-1)
            self._certainty = sure if self._certainty is None else torch.cat([self._certainty, sure], dim=1)
        combine = self.combine
        return PairedLogits(logits, lambda one, other: combine(one, other, steps), combine.at(place))


def token_step(
    model: Any,
    cache: PreallocatedCache,
    tokens: torch.Tensor,
    starts: torch.Tensor,
    seen: torch.Tensor,
    strengths: torch.Tensor | None,
    prompt_length: int,
    last_position: int,
    hidden: torch.Tensor | None,
    context: dict[str, torch.Tensor],
) -> torch.Tensor:
    """
    Guided logits (batch, n, vocab_size) float32 of what follows each token; the cache knows where to write.

    Args:
        tokens: (batch, n) int64.
        starts: (batch,) int64, where the committed positions of each row end.
        seen: (batch, n, nodes) bool, the nodes that each token sees, itself included.
        strengths: of guidance at each token of the picture; `None` where rows are not paired.
        last_position: of the picture; tokens beyond it mean nothing.
        hidden: (rows, prompt) bool, padding of the prompt.
        context: see [`Prompt`].
    """
    copies = 1 if strengths is None else 2
    depth = seen.sum(dim=-1) - 1
    positions = (starts[:, None] + depth).clamp(max=last_position)
    view = View(starts, cache.capacity, seen, hidden)
    logits = model.next_logits(
        input_ids=tokens.repeat(copies, 1),
        position_ids=positions.repeat(copies, 1),
        attention_mask=additive(view.visible(Pattern(), copies * len(tokens)), model.dtype),
        past_key_values=cache,
        logits_to_keep=tokens.shape[1],
        **context,
    ).float()
    if strengths is None:
        return logits
    return Combiner(strengths).at_each(*logits.chunk(2), starts[:, None] - prompt_length + depth + 1)
