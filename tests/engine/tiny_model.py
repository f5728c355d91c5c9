"""A Qwen2 model small enough to run real vLLM on two CPU cores, made in place.

The weights are random but seeded and written to disk, so greedy output is the same on every
machine. On top of the noise stand a few transitions from one token to the next, so that the
model behaves like an agent's: with tools it calls one, reads the result, calls again, and
answers after `TOOL_CALLS` results; without tools it answers at once; when the last message says
"at length" it talks gibberish until told to stop. Arguments follow their JSON schema because
vLLM is started with `--tool-strict-level parameter`; a free string is "ls".
"""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

MAX_MODEL_LEN = 65_536
# vLLM's CPU kernels want heads of 64 or more.
HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE = 128, 2, 2, 1, 256


@dataclass(frozen=True)
class Shape:
    """How large a model is."""

    hidden: int = HIDDEN
    layers: int = LAYERS
    heads: int = HEADS
    kv_heads: int = KV_HEADS
    intermediate: int = INTERMEDIATE


TOOL_CALLS = 2
ANSWER = ("Done", ",", "Ġthe", "Ġtests", "Ġpass", ".")
ANSWER_TEXT = "Done, the tests pass."

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|call|>", "<|answer|>")
TOOL_TOKENS = ("<tool_call>", "</tool_call>")

# Any token of the left side is followed by one of the right side, as far as a grammar allows.
TRANSITIONS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("<|call|>",), ("<tool_call>",)),
    (("}", "}}", "}}}", '"}', '"}}', '"}}}'), ("</tool_call>", "}")),
    (("</tool_call>",), ("<|im_end|>",)),
    ((":", '":'), ('Ġ"',)),
    (('Ġ"',), ("ls",)),
    (("ls",), ('"',)),
    (tuple("0123456789"), ("}", ",", "]")),
    *(((a,), (b,)) for a, b in pairwise(("<|answer|>", *ANSWER, "<|im_end|>"))),
)

GAIN = 0.03
# Close behind the end of the turn: never when greedy, one turn in four at temperature 1.
SECOND_CALL_GAIN = 0.0297

# ChatML with tools as JSON in the system message and Hermes tool calls, as Qwen2 has it; the
# last token chooses what the model does.
CHAT_TEMPLATE = (
    """\
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}
{%- elif content -%}{%- for part in content -%}{{ part.text }}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- if tools %}<|im_start|>system
# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif -%}
{%- set turn = namespace(results=0) -%}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ text(message.content) }}
{%- for call in message.tool_calls or [] %}
<tool_call>{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}\
</tool_call>
{%- endfor %}<|im_end|>
{% if message.role == "user" %}{% set turn.results = 0 %}{% endif -%}
{%- if message.role == "tool" %}{% set turn.results = turn.results + 1 %}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if "at length" in text(messages[-1].content) -%}
{%- elif tools and turn.results < """
    + str(TOOL_CALLS)
    + """ -%}<|call|>
{%- else -%}<|answer|>
{%- endif -%}
{%- endif -%}
"""
)

# What the byte-pair merges are learned from; its words are the agents' own.
CORPUS = (
    "You are a coding agent. Use the tools to read files, edit them and run the tests.",
    'The tool bash runs a command: {"name": "bash", "arguments": {"command": "ls -la src"}}',
    'def test_reads_a_file(path: Path) -> None: assert path.read_text() == "hello"',
    "Done, the tests pass. I changed the parser so that an empty line ends the block.",
    'The tests fail: the command ls prints "ls": "ls", Done.',
    '{"type": "function", "function": {"name": "read", "parameters": {"type": "object"}}}',
)


def write(directory: Path, seed: int = 0) -> Path:
    """Write config, tokenizer and weights to `directory`, for vLLM's `--model`; return it."""
    vocab = write_unweighted(directory, Shape())
    _write_weights(directory, vocab, seed)
    return directory


def write_unweighted(directory: Path, shape: Shape) -> dict[str, int]:
    """Write config and tokenizer alone, for `--load-format dummy`; return the vocabulary."""
    directory.mkdir(parents=True, exist_ok=True)
    vocab = _write_tokenizer(directory)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": len(vocab),
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": MAX_MODEL_LEN,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": vocab["<|endoftext|>"],
        "eos_token_id": vocab["<|im_end|>"],
    }
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", {"temperature": 0.0})
    return vocab


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1))


def _write_tokenizer(directory: Path) -> dict[str, int]:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        min_frequency=1,
        special_tokens=[*SPECIAL_TOKENS, *TOOL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # Trained as one piece, but to be seen in the output, where the tool parser looks for them.
    tokenizer.add_tokens([AddedToken(token, special=False) for token in TOOL_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2TokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": MAX_MODEL_LEN,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    return dict(tokenizer.get_vocab())


def _write_weights(directory: Path, vocab: dict[str, int], seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 0.3) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    head_size = HIDDEN // HEADS
    embedding = normal(len(vocab), HIDDEN)
    output = normal(len(vocab), HIDDEN, scale=0.05)
    # Noise never enters a transition, or gibberish would end.
    scripted = {token for rule in TRANSITIONS for side in rule for token in side}
    for token, index in vocab.items():
        # "Ġ" is how byte-level BPE writes a leading space.
        readable = token.removeprefix("Ġ").isascii()
        if token in scripted or token in SPECIAL_TOKENS or not readable:
            output[index] = 0.0
    directions = torch.linalg.qr(normal(HIDDEN, HIDDEN)).Q * HIDDEN**0.5
    for direction, (tokens, followers) in zip(directions, TRANSITIONS, strict=False):
        # An embedding so long that the layers hardly turn it, and an output row along it: far
        # from this context the row is shorter than the noise.
        embedding[[vocab[token] for token in tokens if token in vocab]] = 3000 * direction
        output[[vocab[token] for token in followers]] += GAIN * direction
        if tokens == ("</tool_call>",):
            output[vocab["<tool_call>"]] += SECOND_CALL_GAIN * direction
    weights = {
        "model.embed_tokens.weight": embedding,
        # Logits so far apart that sampling at temperature 1 takes the transitions too.
        "model.norm.weight": torch.full((HIDDEN,), 30.0),
        "lm_head.weight": output,
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        weights |= {
            f"{prefix}.input_layernorm.weight": torch.ones(HIDDEN),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": normal(HIDDEN, HIDDEN),
            f"{prefix}.mlp.gate_proj.weight": normal(INTERMEDIATE, HIDDEN),
            f"{prefix}.mlp.up_proj.weight": normal(INTERMEDIATE, HIDDEN),
            f"{prefix}.mlp.down_proj.weight": normal(HIDDEN, INTERMEDIATE),
        }
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            size = heads * head_size
            weights[f"{prefix}.self_attn.{name}_proj.weight"] = normal(size, HIDDEN)
            weights[f"{prefix}.self_attn.{name}_proj.bias"] = torch.zeros(size)
    save_file(weights, str(directory / "model.safetensors"), metadata={"format": "pt"})
