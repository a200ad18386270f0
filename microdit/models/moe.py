"""Expert-choice mixture of experts (Zhou et al. 2022, 2202.09368), as in 2407.15811, section 3.

Notable: each expert picks its own tokens, so the load is even by construction and no auxiliary loss is needed. Tokens are gathered
into one (E, B*K, D) batch of matrix products and added back; no one-hot dispatch matrix is ever built.

Shape legend: B batch, T tokens, D dim, E experts, K tokens an expert takes from one sample, F hidden width of an expert,
N = B * K tokens that an expert takes from the batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microdit.models.elementwise import EAGER


class ExpertChoice(nn.Module):
    """A feed-forward layer in which `num_experts` experts each take the tokens that score highest for them."""

    def __init__(self, dim: int, hidden_dim: int, num_experts: int, capacity: float):
        super().__init__()
        self.num_experts = num_experts
        self.capacity = capacity
        self.elementwise = EAGER
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.w_in = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.w_out = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map (B, T, D) -> (B, T, D). Each expert takes K = capacity * T / E tokens of each sample."""
        B, T, D = x_BTD.shape
        tokens_per_expert = int(self.capacity * T / self.num_experts)
        logits_BTE = self.router(x_BTD)
        probabilities_BTE = logits_BTE.softmax(dim=-1, dtype=torch.promote_types(logits_BTE.dtype, torch.float32))
        weight_BEK, token_BEK = probabilities_BTE.transpose(1, 2).topk(tokens_per_expert, dim=-1)

        # The experts' dimension comes first, so that each expert is one matrix product.
        first_token_B11 = torch.arange(0, B * T, T, device=x_BTD.device).view(B, 1, 1)
        token_EN = (token_BEK + first_token_B11).transpose(0, 1).flatten(1)
        chosen_END = self.elementwise.take_chosen(x_BTD.reshape(B * T, D), token_EN)
        hidden_ENF = F.gelu(torch.bmm(chosen_END, self.w_in))
        output_END = torch.bmm(hidden_ENF, self.w_out)
        return self.elementwise.add_weighted(output_END, weight_BEK.transpose(0, 1).flatten(1), token_EN, B * T).view(B, T, D)

    def init_weights(self, output_std: float) -> None:
        """Draw truncated normals: std 0.02 for the router and into the experts, `output_std` out of them."""
        nn.init.trunc_normal_(self.router.weight, std=0.02)
        nn.init.trunc_normal_(self.w_in, std=0.02)
        nn.init.trunc_normal_(self.w_out, std=output_std)
