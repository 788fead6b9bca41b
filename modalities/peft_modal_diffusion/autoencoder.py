"""The autoencoder of latent diffusion as a backbone, and its training (Rombach et al., 2022, arXiv:2112.10752)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_modal.anatomy import AnatomyBuilder, Backbone, Context, Features, FeatureSpec, FrozenMode
from peft_modal.attach import Adapter
from peft_modal.errors import WeightsError
from peft_modal.ranges import NonNegativeFloat, PositiveInt
from peft_modal.tasks.base import Stage, Task
from peft_modal.weights import load_network
from peft_modal_diffusion.layout import open_model, opened


class AutoencoderBackbone(Backbone):
    """diffusers' `AutoencoderKL`: pictures to a normal distribution over latents, and back.

    Args:
        weights: `random`, the `vae` folder of a diffusers pipeline, or a file that `merge` has written.
        channels: Width of each resolution; each but the last halves the sides.
        layers: Residual blocks per resolution.
        latent_channels: Channels of the latents.
        groups: Groups of the group norms.
        sample_size: Sides of the pictures in pixels.
        frozen_mode: See `Backbone`.
        init_seed: Seed of random weights.
    """

    modality: ClassVar[str] = "diffusion"

    def __init__(
        self,
        *,
        weights: str = "random",
        channels: list[PositiveInt] | None = None,
        layers: PositiveInt = 1,
        latent_channels: PositiveInt = 4,
        groups: PositiveInt = 8,
        sample_size: PositiveInt = 32,
        frozen_mode: FrozenMode = "eval",
        init_seed: int = 0,
    ) -> None:
        from diffusers import AutoencoderKL

        widths = tuple(channels or (16, 32, 64))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(init_seed)
            network: Any = AutoencoderKL(  # type: ignore[no-untyped-call]
                down_block_types=("DownEncoderBlock2D",) * len(widths),
                up_block_types=("UpDecoderBlock2D",) * len(widths),
                block_out_channels=widths,
                layers_per_block=layers,
                latent_channels=latent_channels,
                norm_num_groups=groups,
                sample_size=sample_size,
                scaling_factor=1.0,
            )
        self.weights = weights
        super().__init__(network, _anatomy(network), frozen_mode=frozen_mode)

    @classmethod
    def tiny(cls) -> AutoencoderBackbone:
        """The same network at toy size with random weights."""
        return cls(channels=[8, 16], groups=4, sample_size=8)

    def load_weights(self) -> None:
        """Fill the network from what `weights` names.

        Raises:
            WeightsError: It is missing, unreadable, or of another architecture.
        """
        if self.weights == "random":
            return
        folder = Path(self.weights).expanduser()
        if folder.is_dir():
            from diffusers import AutoencoderKL

            part = open_model(AutoencoderKL, str(folder))
            with opened(self.weights, "AutoencoderKL"):
                self.network.load_state_dict(part.state_dict())
            return
        load_network(self.network, folder)

    def extract(self, batch: Mapping[str, Any], context: Context) -> Features:
        """Rebuilt `pixels` (B, 3, H, W) as tokens; extras hold `mean` and `logvar` of the latents (B, C, h, w).

        While training a latent is drawn from the distribution, else its mean is taken.
        """
        del context
        network: Any = self.network
        posterior = network.encode(batch["pixels"]).latent_dist
        latents = posterior.mean
        if self.training:
            latents = latents + posterior.std * torch.randn_like(latents)
        rebuilt = network.decode(latents).sample
        return Features(rebuilt, None, {"mean": posterior.mean, "logvar": posterior.logvar})

    def example_batch(self, batch_size: int = 2) -> dict[str, Tensor]:
        """Random pictures."""
        side = int(self.network.config["sample_size"])  # type: ignore[index]
        pixels = torch.rand(batch_size, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
        return {"pixels": pixels.to(self.device)}

    def feature_spec(self) -> FeatureSpec:
        """Colours of the rebuilt picture."""
        return replace(super().feature_spec(), layout=None)

    @property
    def feature_width(self) -> int:
        """Three colours."""
        return 3

    def blocks_for_checkpointing(self, *, enabled: bool) -> None:
        """Compute blocks again during backward instead of keeping their activations."""
        network: Any = self.network
        (network.enable_gradient_checkpointing if enabled else network.disable_gradient_checkpointing)()


def _anatomy(network: Any) -> Any:  # noqa: ANN401 — diffusers' own class
    """Sites by kind of module, encoder and decoder as stacks; no ports."""
    b = AnatomyBuilder(network, stack="encoder")
    for path, module in network.named_modules():
        b.enter("decoder" if path.startswith(("decoder", "post_quant")) else "encoder")
        if isinstance(module, nn.GroupNorm):
            b.op("norm", path)
        elif isinstance(module, nn.Conv2d):
            b.op("conv", path)
        elif isinstance(module, nn.Linear):
            part = {"to_q": "q", "to_k": "k", "to_v": "v", "0": "out"}[path.rpartition(".")[2]]
            b.op(f"attn.{part}", path)
    return b.build(layouts={})


class Autoencoding(Task):
    """Rebuild pictures: absolute plus squared error, and a small KL divergence that keeps latents near a normal one.

    Args:
        backbone: Supplied by the program.
        adapter: Supplied by the program; method `full` trains all of it.
        head: Supplied by the program; `identity`.
        class_names: Not used; supplied by the program.
        kl_weight: Factor of the mean KL divergence per latent value.
        options: Other arguments of `Task`.
    """

    selection: ClassVar[tuple[str, Literal["min", "max"]]] = ("val/psnr", "max")

    def __init__(
        self,
        backbone: Backbone,
        adapter: Adapter,
        head: nn.Module,
        class_names: tuple[str, ...],
        *,
        kl_weight: NonNegativeFloat = 3e-4,
        **options: Any,  # noqa: ANN401 — typed by `Task`
    ) -> None:
        del class_names
        super().__init__(backbone, adapter, head, **options)
        self.kl_weight = kl_weight

    def forward(self, batch: Mapping[str, Any]) -> Features:
        """The backbone's features: the loss needs the latents, too."""
        features: Features = self.backbone(batch)
        return features

    def losses(self, batch: Mapping[str, Any], output: Features) -> dict[str, Tensor]:
        """Error of the rebuilt picture, and the weighted divergence."""
        rebuilt, pixels = output.tokens.float(), batch["pixels"]
        mean, logvar = output.extras["mean"].float(), output.extras["logvar"].float()
        divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        error = functional.l1_loss(rebuilt, pixels) + functional.mse_loss(rebuilt, pixels)
        return {"loss": error, "divergence": self.kl_weight * divergence}

    def update_metrics(self, stage: Stage, batch: Mapping[str, Any], output: Features) -> None:
        """Peak signal-to-noise ratio in dB, mean over pictures."""
        if stage == "train":
            return
        value = psnr(output.tokens.float().clamp(-1, 1), batch["pixels"]).mean()
        self.log(f"{stage}/psnr", value, on_step=False, on_epoch=True, batch_size=len(batch["pixels"]))


def psnr(rebuilt: Tensor, pixels: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pictures in -1..1, (B,)."""
    error = ((rebuilt - pixels) / 2).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-10).log10()


def whiten(autoencoder: Any, means: Tensor, stds: Tensor) -> None:  # noqa: ANN401 — diffusers' own class
    """Fold each latent channel's mean and deviation into the 1x1 convolutions around the latents; exact.

    Afterwards latents have mean 0 and deviation 1 in every channel, so that the scheduler's one `scaling_factor` is 1.

    Args:
        autoencoder: An `AutoencoderKL` with `quant_conv` and `post_quant_conv`.
        means: Mean of each channel of the latents (C,).
        stds: Standard deviation (C,), of the means or of samples.

    Raises:
        WeightsError: It has no such convolutions.
    """
    before, after = autoencoder.quant_conv, autoencoder.post_quant_conv
    if before is None or after is None:
        raise WeightsError("this autoencoder has no 1x1 convolutions around its latents to fold their statistics into")
    with torch.no_grad():
        channels = len(means)
        # The second half of the rows gives the logarithm of the variance.
        before.weight[:channels] /= stds.view(-1, 1, 1, 1)
        before.bias[:channels] = (before.bias[:channels] - means) / stds
        before.bias[channels:] -= 2 * stds.log()
        after.bias += (after.weight[:, :, 0, 0] * means).sum(1)
        after.weight *= stds.view(1, -1, 1, 1)
