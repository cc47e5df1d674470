"""Starts a fresh Llama with the circuit that copying needs, instead of waiting for it to form.

A small model finds out how to repeat names and numbers from its context only after very many tokens, because two layers
have to fit together first: a head that looks one token back, and a head one layer up that looks for a place whose
previous token equals the current one (an induction head). Here the random weights of two heads per layer are replaced
by ones that do this roughly; training does the rest.
"""

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

CONSTANT = 0.1  # component 0 of every embedding: what a head that looks at positions only can see
REACH = 100  # tokens over which a rotary frequency must hardly turn to be of use for matching contents


@torch.no_grad()
def prepare_copying(model: LlamaForCausalLM) -> None:
    """Writes the circuit into layers 0 and 1, heads 0 and 1 of each."""
    config = model.config
    width, size = config.hidden_size, config.hidden_size // config.num_attention_heads
    angles = _angles(config.rope_parameters["rope_theta"], size)
    model.model.embed_tokens.weight[:, 0] = CONSTANT
    contents, first, second = (_orthogonal(width, size) for _ in range(3))  # [size, width] each, rows orthonormal
    below, above = (model.model.layers[index].self_attn for index in (0, 1))
    for head, (back, room) in enumerate(((1, first), (2, second))):
        rows = slice(head * size, (head + 1) * size)
        below.q_proj.weight[rows], below.k_proj.weight[rows] = _look_back(back, angles, width)
        below.v_proj.weight[rows] = contents
        below.o_proj.weight[:, rows] = 0.04 * room.T
    slow = (angles * REACH < 1).repeat(2)
    for head in (0, 1):
        rows = slice(head * size, (head + 1) * size)
        asked, offered = contents.clone(), first.clone()
        if head == 1:  # two tokens have to match: half of the room is for the second
            asked[::2], offered[::2] = first[::2], second[::2]
        above.q_proj.weight[rows] = 1.7 * asked * slow[:, None]
        above.k_proj.weight[rows] = 1.7 * offered * slow[:, None]
        copied = _orthogonal(width, size)
        above.v_proj.weight[rows] = copied
        above.o_proj.weight[:, rows] = 0.1 * copied.T


def _angles(theta: float, size: int) -> Tensor:
    """Turn per token of each pair of a head's components."""
    return theta ** (-torch.arange(0, size, 2) / size)


def _look_back(back: int, angles: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Query and key weights that see component 0 only and agree best `back` tokens apart."""
    fast = (angles > 0.03).float()
    query, key = torch.zeros(2 * len(angles), width), torch.zeros(2 * len(angles), width)
    query[:, 0] = 1.3 * torch.cat([fast * torch.cos(angles * back), -fast * torch.sin(angles * back)])
    key[:, 0] = 1.3 * torch.cat([fast, torch.zeros_like(fast)])
    return query, key


def _orthogonal(width: int, size: int) -> Tensor:
    rows = torch.linalg.qr(torch.randn(width - 1, size)).Q.T
    return torch.cat([torch.zeros(size, 1), rows], 1)  # blind for component 0
