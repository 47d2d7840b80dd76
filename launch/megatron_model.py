"""The GPT of a Megatron run, from megatron-core's local modules: neither Transformer Engine nor apex is needed."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig

from launch.megatron_config import MegatronConfig

# without Transformer Engine, megatron-core 0.16 reads this name without having defined it
if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Norm:
    """torch's LayerNorm or RMSNorm, marked for sequence parallelism, which megatron-core's own wrapper refuses.

    The mark makes Megatron sum the weight's gradient over tensor ranks, each of which sees a part of the sequence.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> Any:
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm: Any = kind(hidden_size, eps=eps)
        for weight in norm.parameters():
            weight.sequence_parallel = config.sequence_parallel
        return norm


def transformer_config(config: MegatronConfig, *, cuda: bool) -> TransformerConfig:
    """What megatron-core wants to know of model, precision and parallelism."""
    model, parallel = config.model, config.parallel
    gated = model.activation == "swiglu"
    interleaved = parallel.virtual_pipeline > 1
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.feed_forward,
        num_attention_heads=model.attention_heads,
        num_query_groups=model.query_groups,
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=gated,
        activation_func=torch.nn.functional.silu if gated else torch.nn.functional.gelu,
        add_bias_linear=model.bias,
        attention_dropout=model.dropout,
        hidden_dropout=model.dropout,
        init_method_std=model.init_std,
        num_moe_experts=model.experts or None,
        moe_ffn_hidden_size=model.expert_feed_forward if model.experts else None,
        moe_router_topk=model.experts_per_token,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="aux_loss" if model.balancing_loss else "none",
        moe_aux_loss_coeff=model.balancing_loss,
        moe_token_dispatcher_type=model.dispatcher,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        # sent in one batch, two stages would take an activation for a gradient
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        sequence_parallel=parallel.sequence,
        bf16=config.precision == "bf16",
        params_dtype=_DTYPES[config.precision],
        pipeline_dtype=_DTYPES[config.precision],
        use_cpu_initialization=not cuda,
        deterministic_mode=config.run.deterministic,
        # these would need apex or Transformer Engine
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )


def build_chunks(
    config: MegatronConfig, transformer: TransformerConfig, vocabulary: int, *, cuda: bool
) -> list[MegatronModule]:
    """This rank's model chunks, one for each virtual stage, on its device and in the run's precision."""
    stages = config.parallel.virtual_pipeline
    chunks = []
    for number in range(stages):
        stage = number if stages > 1 else None
        model: MegatronModule = GPTModel(
            config=transformer,
            transformer_layer_spec=_block_spec(transformer, stage),
            vocab_size=vocabulary,
            max_sequence_length=config.data.sequence_length,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            share_embeddings_and_output_weights=config.model.tied_embeddings,
            position_embedding_type="rope" if config.model.positions == "rotary" else "learned_absolute",
            rotary_base=config.model.rotary_base,
            vp_stage=stage,
        )
        if cuda:
            model = model.cuda()
        if config.init == "by_name":
            fill_by_name(model, config)
        if transformer.bf16:
            model = Float16Module(transformer, model)
        chunks.append(model)
    return chunks


def _block_spec(transformer: TransformerConfig, stage: int | None) -> Any:
    spec = get_gpt_decoder_block_spec(transformer, use_transformer_engine=False, vp_stage=stage)
    spec.layer_norm = Norm
    for layer in spec.layer_specs:
        layer.submodules.input_layernorm = Norm
        layer.submodules.pre_mlp_layernorm = Norm
    return spec


def fill_by_name(model: MegatronModule, config: MegatronConfig) -> None:
    """Draw every matrix whole, from a generator seeded by the run's seed and its name, and keep this rank's part.

    The result does not depend on the parallel layout. Norms and biases stay as they were built, at 1 and 0.
    """
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            continue
        expert = ".experts." in name
        split = getattr(weight, "tensor_model_parallel", False)
        group = (
            parallel_state.get_expert_tensor_parallel_group()
            if expert
            else parallel_state.get_tensor_model_parallel_group()
        )
        size, rank, axis = (group.size(), group.rank(), weight.partition_dim) if split else (1, 0, 0)
        shape = list(weight.shape)
        shape[axis] *= size
        key = f"{config.seed} {logical_name(model, name)}"
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        whole = torch.randn(shape, generator=generator) * config.model.init_std
        # a gated layer's matrix is two: a rank holds its rows of the gate, then its rows of the other one
        halves = whole.chunk(2) if config.model.activation == "swiglu" and "linear_fc1" in name else (whole,)
        with torch.no_grad():
            weight.copy_(torch.cat([half.chunk(size, dim=axis)[rank] for half in halves]))


def logical_name(model: MegatronModule, name: str) -> str:
    """A parameter's name with the numbers that its layer and expert have in the whole model."""
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    words = name.split(".")
    if words[:2] == ["decoder", "layers"]:
        layer = model.decoder.layers[int(words[2])]
        words[2] = str(layer.layer_number - 1)
        if "local_experts" in words:
            place = words.index("local_experts") + 1
            words[place] = str(layer.mlp.local_expert_indices[int(words[place])])
    return ".".join(words)
