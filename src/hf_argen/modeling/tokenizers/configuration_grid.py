"""Configuration of the tokenizers whose tokens are the cells of one grid over the picture, row by row."""

from typing import Any

GridSize = int | list[int] | tuple[int, ...]


def as_sides(grid_size: GridSize) -> tuple[int, int]:
    """(height, width) of a grid, of which a number is the side of a square."""
    return (grid_size, grid_size) if isinstance(grid_size, int) else (int(grid_size[0]), int(grid_size[1]))


def normalize_grid(grid_size: GridSize | None) -> int | list[int] | None:
    """The form that is stored: `n` for a square grid, `[height, width]` otherwise."""
    if grid_size is None:
        return None
    height, width = as_sides(grid_size)
    if height < 1 or width < 1:
        raise ValueError(f"grid_size is {grid_size}; every side must be at least 1.")
    return height if height == width else [height, width]


class GridConfigMixin:
    """For configurations with `channel_multiplier` and `grid_size` (`None`: pictures of any size)."""

    channel_multiplier: Any
    grid_size: Any

    @property
    def downsampling_factor(self) -> int:
        """Pixels per side of one token."""
        return 2 ** (len(self.channel_multiplier) - 1)

    @property
    def grid_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of the token grid, as a list of one; empty if any size will do."""
        return [] if self.grid_size is None else [as_sides(self.grid_size)]


class GridTokenizerConfigMixin(GridConfigMixin):
    """Of tokenizers whose cells are codes out of a book: the configuration has `codebook_size`, too."""


def complete_from_tokenizer(config: Any, codebook_size: int, grid_size: GridSize) -> None:
    """
    Fills `vocab_size` and `grid_size` of a transformer's configuration from that of its tokenizer, and the other way
    round the grid of a tokenizer that takes pictures of any size.

    Args:
        config: of the transformer.
        codebook_size, grid_size: without tokenizer.
    """
    tokenizer = config.image_tokenizer_config
    if tokenizer is not None and not isinstance(tokenizer, GridTokenizerConfigMixin):
        raise ValueError(
            f"image_tokenizer_config is of type {tokenizer.model_type!r}; this model takes tokenizers with one grid of "
            "tokens, such as 'llamagen_vq' or 'maskgit_vq'."
        )
    if config.vocab_size is None:
        config.vocab_size = codebook_size if tokenizer is None else tokenizer.codebook_size
    if config.grid_size is None:
        config.grid_size = getattr(tokenizer, "grid_size", None) or grid_size
    config.grid_size = normalize_grid(config.grid_size)
    if tokenizer is not None and tokenizer.grid_size is None:
        tokenizer.grid_size = config.grid_size


def check_same_tokens(config: Any, tokenizer: Any) -> None:
    """
    Refuses a tokenizer of other codes or another grid than a transformer's; one that takes pictures of any size gets
    the grid.

    Args:
        config: of the transformer.
        tokenizer: the tokenizer's configuration.
    """
    if not isinstance(tokenizer, GridTokenizerConfigMixin):
        raise ValueError(f"An image tokenizer of type {tokenizer.model_type!r} has no single grid of tokens.")
    if tokenizer.codebook_size != config.vocab_size:
        raise ValueError(
            f"vocab_size is {config.vocab_size} in the model and {tokenizer.codebook_size} in its image "
            "tokenizer; they must agree."
        )
    tokenizer.grid_size = tokenizer.grid_size or config.grid_size
    if tokenizer.grid_sizes != config.grid_sizes:
        raise ValueError(
            f"The token grid is {config.grid_sizes[0]} in the model and {tokenizer.grid_sizes[0]} in its image "
            "tokenizer; they must agree."
        )
