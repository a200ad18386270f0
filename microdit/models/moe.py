"""Expert-choice mixture of experts (Zhou et al. 2022, 2202.09368), as in 2407.15811, section 3.

Notable: each expert picks its own tokens, so the load is even by construction and no auxiliary loss is needed. Tokens are gathered
into one (E, B*K, D) batch of matrix products and added back; no one-hot dispatch matrix is ever built.

Shape legend: B batch, T tokens, D dim, E experts, K tokens an expert takes from one sample, F hidden width of an expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ExpertChoice(nn.Module):
    """A feed-forward layer in which `num_experts` experts each take the tokens that score highest for them."""

    def __init__(self, dim: int, hidden_dim: int, num_experts: int, capacity: float):
        super().__init__()
        self.num_experts = num_experts
        self.capacity = capacity
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

        # One flat index serves both gather and scatter. The experts' dimension comes first, so that each expert is one matrix product.
        first_token_B11 = torch.arange(0, B * T, T, device=x_BTD.device).view(B, 1, 1)
        flat_token = (token_BEK + first_token_B11).transpose(0, 1).reshape(-1)
        chosen_END = x_BTD.reshape(B * T, D).index_select(0, flat_token).view(self.num_experts, -1, D)
        hidden_ENF = F.gelu(torch.bmm(chosen_END, self.w_in))
        output_END = torch.bmm(hidden_ENF, self.w_out)
        output_END = output_END * weight_BEK.to(output_END.dtype).transpose(0, 1).reshape(self.num_experts, -1, 1)

        mixed = torch.zeros(B * T, D, dtype=output_END.dtype, device=x_BTD.device)
        return mixed.index_add(0, flat_token, output_END.view(-1, D)).view(B, T, D)

    def init_weights(self, output_std: float) -> None:
        """Draw truncated normals: std 0.02 for the router and into the experts, `output_std` out of them."""
        nn.init.trunc_normal_(self.router.weight, std=0.02)
        nn.init.trunc_normal_(self.w_in, std=0.02)
        nn.init.trunc_normal_(self.w_out, std=output_std)
