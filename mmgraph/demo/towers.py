"""Builds the demo's towers: a small CLIP in Hugging Face format, with seeded random weights and its own tokenizer."""

import json
from pathlib import Path

import torch
from safetensors.torch import save
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from mmgraph.towers.clip import RANDOM_WEIGHTS_MARK

SEED, WIDTH, LAYERS, HEADS, IMAGE, PATCH, VOCABULARY = 0, 128, 2, 4, 72, 18, 4096


def build_towers(folder: Path, texts: list[str], real_size: bool = False) -> None:
    """Write model, tokenizer and image processor. Like any CLIP model, they can be used with ``--model_name folder``.

    Args:
        folder: folder to create.
        texts: texts to learn the tokenizer's byte-pair merges from.
        real_size: whether the model has the size of ViT-B/32, except for the vocabulary.
    """
    tokenizer = _train_tokenizer(texts)
    small = {
        "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "projection_dim": WIDTH,
    }  # fmt: skip
    ends = {
        "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    if real_size:
        side, config = 224, CLIPConfig(text_config=ends)
    else:
        side = IMAGE
        vision = {**small, "image_size": side, "patch_size": PATCH}
        config = CLIPConfig(text_config={**small, **ends}, vision_config=vision, projection_dim=WIDTH)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = CLIPModel(config)
    folder.mkdir()
    config.save_pretrained(folder)
    # model.save_pretrained is not used, because it imports an installed DeepSpeed, which takes seconds and prints
    # messages.
    (folder / "model.safetensors").write_bytes(save(dict(model.state_dict()), metadata={"format": "pt"}))
    tokenizer.save_pretrained(folder)
    (folder / RANDOM_WEIGHTS_MARK).write_text(
        "The weights of these towers are random and untrained. They are for mmgraph's demo and benchmarks.\n"
    )
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(folder)


def _train_tokenizer(texts: list[str]) -> CLIPTokenizer:
    backend = CLIPTokenizer().backend_tokenizer
    letters = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        show_progress=False,
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        # The word-final letters are special tokens, because special tokens get their ids in the given order. Otherwise
        # their ids follow the order of a hash table, which differs between builds and changes how ties between merges
        # are broken.
        special_tokens=["<|startoftext|>", "<|endoftext|>", *(f"{letter}</w>" for letter in letters)],
    )
    backend.train_from_iterator(texts, trainer)
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=77)  # type: ignore[arg-type]
