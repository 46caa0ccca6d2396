"""What end-of-document tokens mean for a batch. The token itself still belongs to its document."""

import torch


def document_ids(tokens: torch.Tensor, eod: int) -> torch.Tensor:
    """Index of the document within the sample, int64 like `tokens` [B, s], from 0."""
    ends = tokens == eod
    return ends.cumsum(dim=1) - ends.long()


def position_ids(tokens: torch.Tensor, eod: int) -> torch.Tensor:
    """Position within the document, int64 like `tokens` [B, s], from 0 after each end of document."""
    positions = torch.arange(tokens.size(1)).expand_as(tokens)
    starts = torch.zeros_like(tokens)
    starts[:, 1:] = torch.where(tokens[:, :-1] == eod, positions[:, 1:], 0)
    return positions - starts.cummax(dim=1).values


def loss_mask(tokens: torch.Tensor, eod: int) -> torch.Tensor:
    """float32 [B, s]: 0 where the input token is an end of document (its label opens an unrelated text), else 1."""
    return (tokens != eod).float()
