"""Small random language models of the families of transformers, and what is expected of their neurons."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

CLASSES = 3
WIDTH, UNITS, HEADS = 32, 48, 4

TOKENS = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": CLASSES}
STACK = {**TOKENS, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "max_position_embeddings": 64}
PLAIN = {**STACK, "intermediate_size": UNITS}
GROUPED = {**PLAIN, "num_key_value_heads": 2}
RELATIVE = {**PLAIN, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 16}
GPT = {**TOKENS, "n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "n_inner": UNITS, "n_positions": 64}
DISTIL = {**TOKENS, "dim": WIDTH, "n_layers": 2, "n_heads": HEADS, "hidden_dim": UNITS, "max_position_embeddings": 64}
T5 = {**TOKENS, "d_model": WIDTH, "d_kv": 8, "d_ff": UNITS, "num_layers": 2, "num_heads": HEADS, "decoder_start_token_id": 0}
SIDES: dict[str, Any] = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 2), ("attention_heads", HEADS))}
PAIR = {
    **{k: v for k, v in TOKENS.items() if k != "num_labels"},
    **SIDES,
    "d_model": WIDTH,
    "encoder_ffn_dim": UNITS,
    "decoder_ffn_dim": UNITS,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": None,
}
CLASSIFIER = "ForSequenceClassification"


@dataclass(frozen=True)
class Family:
    """A model with the sizes of the groups that are expected of it, by role, in order of execution."""

    model: str
    options: dict[str, Any]
    hidden: tuple[int, ...] = (UNITS, UNITS)
    attention: tuple[int, ...] = (WIDTH, WIDTH)
    norm: tuple[int, ...] = (WIDTH,) * 5
    blocks: int = 2
    attentions: tuple[str, ...] = ("sdpa", "eager")
    fronts: dict[str, str] = field(default_factory=dict)  # norm -> the layer in front of it, which it owns

    @property
    def classes(self) -> int | None:
        return CLASSES if self.model.endswith(CLASSIFIER) else None

    @property
    def expected(self) -> dict[str, list[int]]:
        head = [self.classes] if self.classes else []
        return {"hidden": list(self.hidden), "attention": list(self.attention), "norm": list(self.norm), "head": head}

    def make(self, attention: str | None = None, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        kind = getattr(transformers, self.model)
        return kind(kind.config_class(**self.options, attn_implementation=attention or self.attentions[0])).eval()


POOLED = (UNITS, UNITS, WIDTH)  # the perceptrons, and the pooler's units at the input of the classifier
BOTH = {"hidden": (UNITS,) * 4, "attention": (WIDTH,) * 6, "norm": (WIDTH,) * 12, "blocks": 4}  # self-attention twice, cross-attention
EAGER = {"attentions": ("eager",)}

FAMILIES = {
    "bert": Family("Bert" + CLASSIFIER, PLAIN, POOLED),
    "roberta": Family("Roberta" + CLASSIFIER, PLAIN, POOLED),
    "distilbert": Family("DistilBert" + CLASSIFIER, DISTIL, POOLED),
    "deberta": Family("Deberta" + CLASSIFIER, RELATIVE, POOLED, **EAGER),
    "deberta-v2": Family("DebertaV2" + CLASSIFIER, RELATIVE, POOLED, **EAGER),
    "deberta-v3": Family(  # the projections of queries and keys run three times each
        "DebertaV2" + CLASSIFIER,
        {**RELATIVE, "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False, "conv_kernel_size": 3},
        POOLED,
        norm=(WIDTH,) * 7,
        **EAGER,
    ),
    "modernbert": Family(
        "ModernBert" + CLASSIFIER,
        {**PLAIN, "cls_token_id": 1, "sep_token_id": 2},
        norm=(WIDTH,) * 6,
        fronts={"head.norm": "head.dense"},
    ),
    "electra": Family("Electra" + CLASSIFIER, {**PLAIN, "embedding_size": 16}, POOLED, norm=(16, *(WIDTH,) * 4)),
    "albert": Family(  # one layer runs twice
        "Albert" + CLASSIFIER,
        {**PLAIN, "embedding_size": 16},
        (UNITS, WIDTH),
        (WIDTH,),
        (16, WIDTH, WIDTH),
        blocks=1,
    ),
    "bart-classifier": Family("Bart" + CLASSIFIER, PAIR, **{**BOTH, "hidden": (*(UNITS,) * 4, WIDTH)}),
    "gpt2-classifier": Family("GPT2" + CLASSIFIER, GPT),
    "llama-classifier": Family("Llama" + CLASSIFIER, GROUPED),
    "gpt2": Family("GPT2LMHeadModel", GPT),
    "llama": Family("LlamaForCausalLM", GROUPED),
    "llama-ungrouped": Family("LlamaForCausalLM", PLAIN),
    "mistral": Family("MistralForCausalLM", GROUPED),
    "qwen2": Family("Qwen2ForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    "qwen3": Family("Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}, norm=(*(WIDTH, 8, 8, WIDTH) * 2, WIDTH)),
    "opt": Family("OPTForCausalLM", {**STACK, "ffn_dim": UNITS}),
    "opt-350m": Family(  # projections around the stack, norms behind the layers
        "OPTForCausalLM",
        {**STACK, "ffn_dim": UNITS, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
        norm=(WIDTH,) * 4,
    ),
    "phi": Family("PhiForCausalLM", GROUPED, norm=(WIDTH,) * 3),
    "phi3": Family("Phi3ForCausalLM", GROUPED),
    "gemma": Family("GemmaForCausalLM", {**GROUPED, "head_dim": 8}, norm=()),
    "gemma3": Family("Gemma3ForCausalLM", {**GROUPED, "head_dim": 8}, norm=()),
    "gpt-neox": Family("GPTNeoXForCausalLM", PLAIN),
    "falcon": Family("FalconForCausalLM", {**STACK, "ffn_hidden_size": UNITS}, norm=(WIDTH,) * 3),
    "t5": Family("T5ForConditionalGeneration", T5, **BOTH),
    "t5-gated": Family("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, **BOTH),
    "marian": Family("MarianMTModel", PAIR, **{**BOTH, "norm": (WIDTH,) * 10}),
    "bart": Family("BartForConditionalGeneration", PAIR, **BOTH),
}


def forward(model: nn.Module) -> Tensor:
    """Logits of two sentences of seven tokens, one with padding; for a decoder of its own, of five tokens each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 100, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, 5:] = mask[0, 5:] = 0
    ids[:, 4] = 2  # where a BART classifier reads
    batch = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder and not type(model).__name__.endswith(CLASSIFIER):
        batch["decoder_input_ids"] = torch.randint(3, 100, (2, 5), generator=generator)
    return model(**batch).logits
