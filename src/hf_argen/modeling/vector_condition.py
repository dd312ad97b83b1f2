"""One vector per picture as its condition: a class, or a pooled text (VAR, RAR)."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForTextEncoding, PreTrainedConfig

from .layers.precision import suited
from .layers.text_pooling import check_prompts, pool_tokens


class VectorConditionModules:
    """
    For the transformer of a family: the weights that make the vector, and how they are used.

    The class has `dtype_of_computation`, of hidden states; a weight that no quantization touches tells, those of linear
    layers may be int8.
    """

    config: Any

    def add_condition_modules(self, config: Any) -> None:
        """Class embedding, or projection of the text with its null text and, where configured, its encoder."""
        if config.condition_type == "class":
            self.class_embedding = nn.Embedding(config.num_classes + 1, config.hidden_size)
        else:
            self.null_text_embedding = nn.Embedding(1, config.text_embed_dim)
            self.text_projection = nn.Linear(config.text_embed_dim, config.hidden_size)
            self.text_encoder = self.build_text_encoder(config.text_encoder_config)

    @staticmethod
    def build_text_encoder(config: PreTrainedConfig | None) -> nn.Module | None:
        """Any text encoder of transformers, without the pooling layer that some have: tokens are averaged here."""
        if config is None:
            return None
        has_encoder_class = type(config) in AutoModelForTextEncoding._model_mapping  # of T5 the encoder alone
        encoder = (AutoModelForTextEncoding if has_encoder_class else AutoModel).from_config(config)
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None
        return encoder

    def class_condition(self, class_labels: torch.Tensor) -> torch.Tensor:
        """Class labels (batch,), -1 for the null class, to conditions (batch, hidden_size)."""
        return self.class_embedding(torch.where(class_labels < 0, self.config.num_classes, class_labels))

    def encoded_text(
        self,
        prompt_embeds: torch.Tensor | None,
        prompt_ids: torch.Tensor | None,
        prompt_attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Text embeddings as given, or those of the tokens, (batch, tokens, text_embed_dim), by the text encoder."""
        check_prompts(
            prompt_embeds,
            prompt_ids,
            prompt_attention_mask,
            self.config.text_embed_dim,
            self.config.text_encoder_config,
        )
        if prompt_embeds is None:
            encoded = self.text_encoder(input_ids=prompt_ids, attention_mask=prompt_attention_mask)
            return encoded.last_hidden_state
        return prompt_embeds

    def pool_text(
        self,
        prompt_embeds: torch.Tensor | None = None,
        prompt_ids: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Pooled text embeddings (batch, text_embed_dim): as given, or the mean over the tokens that the mask keeps of
        given or encoded token embeddings (batch, tokens, text_embed_dim).
        """
        prompt_embeds = self.encoded_text(prompt_embeds, prompt_ids, prompt_attention_mask)
        return prompt_embeds if prompt_embeds.ndim == 2 else pool_tokens(prompt_embeds, prompt_attention_mask)

    def text_condition(self, pooled: torch.Tensor, drop: torch.Tensor | None = None) -> torch.Tensor:
        """Pooled text (batch, text_embed_dim), the null text where `drop` (batch,) is set, to conditions."""
        if drop is not None:
            null = self.null_text_embedding(drop.new_zeros(drop.shape, dtype=torch.long))
            pooled = torch.where(drop[:, None], null, pooled.to(null.dtype))
        condition = self.text_projection(suited(pooled.to(self.dtype_of_computation), self.text_projection))
        return condition.to(self.dtype_of_computation)


class VectorConditionMixin:
    """For the generator of a family, whose `model` has [`VectorConditionModules`]."""

    config: Any

    def condition(
        self,
        class_labels: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_ids: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        drop: torch.Tensor | None = None,
        batch_size: int | None = None,
    ) -> torch.Tensor:
        """
        What the pictures shall show, as vectors (batch, hidden_size).

        Args:
            class_labels: (batch,) int64, -1 for none; class-conditional models.
            prompt_embeds: (batch, text_embed_dim) pooled, or (batch, tokens, text_embed_dim).
            prompt_ids, prompt_attention_mask: (batch, tokens), for the text encoder inside the model.
            drop: (batch,) bool, the rows that take the null condition instead.
            batch_size: without any condition, the number of rows of the null condition.
        """
        if batch_size is not None:
            return self.null_condition(batch_size)
        if self.config.condition_type == "class":
            if class_labels is None or prompt_embeds is not None or prompt_ids is not None:
                raise ValueError(
                    "This model draws from class labels; give class_labels alone, -1 for no class."
                )
            self.check_class_labels(class_labels)
            if drop is not None:
                class_labels = torch.where(drop, self.config.num_classes, class_labels)
            return self.model.class_condition(class_labels)
        if class_labels is not None:
            raise ValueError(
                "This model draws from text; give prompt_ids or prompt_embeds, not class_labels."
            )
        return self.model.text_condition(
            self.model.pool_text(prompt_embeds, prompt_ids, prompt_attention_mask), drop
        )

    def check_class_labels(self, class_labels: torch.Tensor) -> None:
        """Refuses labels that are neither a class nor the null class, which is -1 or, as in the authors' code, num_classes."""
        is_whole = isinstance(class_labels, torch.Tensor) and class_labels.dtype in (torch.int64, torch.int32)
        if not is_whole or class_labels.ndim != 1:
            raise ValueError(f"class_labels are {class_labels}; give a tensor (batch,) of whole numbers.")
        for label in map(int, class_labels.aminmax()):
            if not -1 <= label <= self.config.num_classes:
                raise ValueError(
                    f"class label {label} is out of range; this model has the classes 0 to "
                    f"{self.config.num_classes - 1}, and -1 for none."
                )

    def null_condition(self, batch_size: int) -> torch.Tensor:
        """The condition of unconditional rows, (batch_size, hidden_size)."""
        rows = torch.ones(batch_size, dtype=torch.bool, device=self.input_device)
        if self.config.condition_type == "class":
            return self.model.class_condition(-rows.long())
        return self.model.text_condition(torch.zeros(batch_size, 1, device=rows.device), drop=rows)
