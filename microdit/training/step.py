"""The model and its loss as one module: the one thing that FSDP needs to wrap."""

from torch import Tensor, nn

from microdit.diffusion.edm import EDM, edm_loss
from microdit.model.microdit import MicroDiT
from microdit.training.draws import TrainingBatch


class DenoisingLoss(nn.Module):
    """forward(batch) -> the loss of each sample, (B,), float32."""

    def __init__(self, model: MicroDiT, edm: EDM, mask_padding: bool):
        super().__init__()
        self.model, self.edm, self.mask_padding = model, edm, mask_padding

    def forward(self, batch: TrainingBatch) -> Tensor:
        mask_BL = batch.text_mask_BL if self.mask_padding else None
        text_BLE = batch.text_BLE * batch.caption_kept_B.view(-1, 1, 1)
        caption = self.model.embed_caption(text_BLE.to(self.model.patch_embed.weight.dtype), mask_BL)
        draws = batch.sigma_B, batch.noise_BCHW, batch.keep_ids_BK, batch.path_kept_B
        return edm_loss(self.model, self.edm, batch.latents_BCHW, caption, *draws)
