"""The embedded toy: a small world in which visual latents can matter, and a tiny Qwen2.5-VL that sees it.

A 3 x 3 board of coloured shapes. "Start at nw. Moves: mirror, down, flip. Which two pieces does the dot reach last?"
The auxiliary image is a 2 x 2 storyboard: four empty boards that show the dot after each move (the start stands in
where there are fewer than four). A move is an easy function of the place before it; three in a row are not easy in
one pass of a four-layer decoder. The answer names two of nine pieces, so a guess is right once in 72.

    python toy.py data     write out/toy/{train,val,test}.jsonl and their images
    python toy.py base     rebuild toy/base, the tiny Qwen2.5-VL
"""

import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data import start
from model import IGNORE, embed, load_vlm, positions

# ---------------------------------------------------------------------------------------------------
seed = 12345
data_folder = "out/toy"
n_train, n_val, n_test = 6000, 200, 1000
base_folder = "toy/base"
base_scale = 1.0  # of the number of steps
base_batch = 30
base_lr = 1e-3  # at 2e-3 it never learns to relate a place to a cell
first_phase = 0  # 1 to 3: go on from the base_folder that the phases before it left
threads = 2
# ---------------------------------------------------------------------------------------------------

CELL = 28  # pixels: one merged vision token
COLOURS = {
    "red": "#d62728",
    "green": "#1f9a2f",
    "blue": "#1f4fd6",
    "yellow": "#f0d000",
    "purple": "#8a2be2",
    "black": "#202020",
    "orange": "#ff8c1a",
    "pink": "#ff8fc8",
    "cyan": "#20c8e0",
    "brown": "#7a4a1e",
}
SHAPES = ["circle", "square", "triangle", "diamond", "cross", "ring"]
PIECES = [(colour, shape) for colour in COLOURS for shape in SHAPES]
GROUNDS = [(255, 225, 190), (225, 245, 225), (190, 220, 255)]  # by column
PLACES = ["nw", "n", "ne", "w", "mid", "e", "sw", "s", "se"]  # reading order
MOVES = {  # (row, column) -> (row, column)
    "right": lambda r, c: (r, (c + 1) % 3),
    "down": lambda r, c: ((r + 1) % 3, c),
    "mirror": lambda r, c: (r, 2 - c),
    "flip": lambda r, c: (2 - r, c),
    "clockwise": lambda r, c: (c, 2 - r),
    "swap": lambda r, c: (c, r),
}
PARSER = "four small boards, each with the dot one move later"


def move(place, name):
    """The place (0 to 8) that a move takes a place to."""
    r, c = MOVES[name](*divmod(place, 3))
    return 3 * r + c


def draw_cell(piece, place):
    """A 28 px cell with a piece. The ground tells the place, as the squares of a chess board do: rows darken
    downwards, columns go from warm to cold."""
    row, column = divmod(place, 3)
    cell = Image.new(
        "RGB", (CELL, CELL), tuple(int(v * (1, 0.8, 0.6)[row]) for v in GROUNDS[column])
    )
    draw = ImageDraw.Draw(cell)
    colour, shape = COLOURS[piece[0]], piece[1]
    x0, y0, x1, y1 = 5, 5, 22, 22
    xm, ym = (x0 + x1) // 2, (y0 + y1) // 2
    if shape == "circle":
        draw.ellipse((x0, y0, x1, y1), fill=colour)
    elif shape == "square":
        draw.rectangle((x0, y0, x1, y1), fill=colour)
    elif shape == "triangle":
        draw.polygon([(xm, y0), (x1, y1), (x0, y1)], fill=colour)
    elif shape == "diamond":
        draw.polygon([(xm, y0), (x1, ym), (xm, y1), (x0, ym)], fill=colour)
    elif shape == "cross":
        draw.rectangle((xm - 2, y0, xm + 2, y1), fill=colour)
        draw.rectangle((x0, ym - 2, x1, ym + 2), fill=colour)
    else:
        draw.ellipse((x0, y0, x1, y1), outline=colour, width=4)
    return cell


def draw_panel(place):
    """A 28 px empty board with the dot at one place."""
    panel = Image.new("RGB", (CELL, CELL), "#ffffff")
    draw = ImageDraw.Draw(panel)
    for i in range(4):
        draw.line((2 + 8 * i, 2, 2 + 8 * i, 26), fill="#999999")
        draw.line((2, 2 + 8 * i, 26, 2 + 8 * i), fill="#999999")
    r, c = divmod(place, 3)
    draw.ellipse((3 + 8 * c, 3 + 8 * r, 9 + 8 * c, 9 + 8 * r), fill="#c00000")
    return panel


def tile(cells, columns):
    """Paste 28 px cells in reading order."""
    image = Image.new("RGB", (CELL * columns, CELL * (len(cells) // columns)))
    for i, cell in enumerate(cells):
        image.paste(cell, (CELL * (i % columns), CELL * (i // columns)))
    return image


def new_board(rng):
    """Nine pieces in reading order, no two of one colour."""
    return [(colour, rng.choice(SHAPES)) for colour in rng.sample(list(COLOURS), 9)]


def new_path(rng, n_moves):
    """A start, moves that each change the place, and the places on the way (n_moves + 1)."""
    path, names = [rng.randrange(9)], []
    for _ in range(n_moves):
        names.append(rng.choice([m for m in MOVES if move(path[-1], m) != path[-1]]))
        path.append(move(path[-1], names[-1]))
    return names, path


def storyboard(path):
    """The places of the four dots: after each of the last moves, the start standing in where there are fewer."""
    return [path[max(0, len(path) - 4 + k)] for k in range(4)]


def question_of(names, path):
    return f"Start at {PLACES[path[0]]}. Moves: {', '.join(names)}. Which two pieces does the dot reach last?"


def answer_of(board, path):
    return ", ".join(" ".join(board[p]) for p in path[-2:])


def write_split(folder, split, n):
    """Write n examples and their images from the seed."""
    rng = random.Random(f"{seed}/{split}")
    images = folder / split
    images.mkdir(parents=True, exist_ok=True)
    with open(folder / f".{split}.jsonl", "w") as f:
        for i in tqdm(range(n), desc=split, unit="example"):
            board, n_moves = new_board(rng), (1, 2, 3, 4, 1)[i % 5]
            names, path = new_path(rng, n_moves)
            tile([draw_cell(board[p], p) for p in range(9)], 3).save(images / f"{i}.png")
            tile([draw_panel(p) for p in storyboard(path)], 2).save(images / f"{i}-aux.png")
            answer = answer_of(board, path)
            think = (
                f"<think> Follow the dot. <latent></latent> <parser> {PARSER} </parser> </think>"
            )
            f.write(
                json.dumps(
                    {
                        "id": f"{split}-{i}",
                        "images": [f"{split}/{i}.png"],
                        "question": question_of(names, path),
                        "answer": answer,
                        "response": f"{think} <answer> {answer} </answer>",
                        "aux_images": [f"{split}/{i}-aux.png"],
                        "category": f"{n_moves} moves",
                    }
                )
                + "\n"
            )
    (folder / f".{split}.jsonl").rename(folder / f"{split}.jsonl")


# ---------------------------------------------------------------------------------------------------
# the base: a tiny Qwen2.5-VL, trained to see boards and storyboards and to make one move

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHAT_TEMPLATE = (  # the ChatML prompt of Qwen2.5-VL, for text and images
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def lesson(kind, rng):
    """One training text of the base: (board or None, dots or None, question, [(text, has_loss), ...])."""
    board, steps = new_board(rng), [(rng.randrange(9), rng.choice(list(MOVES))) for _ in range(9)]
    dots = [rng.randrange(9) for _ in range(4)]
    name = [" " + " ".join(piece) for piece in board]
    if kind == "look":  # relating a named place to a cell is the slow part: all nine in one text
        order = rng.sample(range(9), 9)
        return (
            board,
            None,
            "List the pieces.",
            [s for p in order for s in ((f" {PLACES[p]}", 0), (name[p] + ",", 1))],
        )
    if kind == "where":  # the way back shows the tower that the ground matters
        order = rng.sample(range(9), 9)
        return (
            board,
            None,
            "Find the pieces.",
            [
                s
                for p in order
                for s in ((f" {board[p][0]}", 0), (f" {board[p][1]} {PLACES[p]},", 1))
            ],
        )
    if kind == "step":
        pairs = [((f" {PLACES[p]} {m}", 0), (f" {PLACES[move(p, m)]},", 1)) for p, m in steps]
        return None, None, "Make single moves.", [s for pair in pairs for s in pair]
    if kind == "steplook":
        pairs = [((f" {PLACES[p]} {m}", 0), (name[move(p, m)] + ",", 1)) for p, m in steps]
        return board, None, "Make single moves and look.", [s for pair in pairs for s in pair]
    if kind == "dots":
        return None, dots, "Where are the dots?", [("".join(f" {PLACES[p]}," for p in dots), 1)]
    if kind == "dotlook":
        return (
            board,
            dots,
            "Which pieces are under the dots?",
            [("".join(f"{name[p]}," for p in dots), 1)],
        )
    names, path = new_path(
        rng, rng.randint(2, 4) if "any" in kind else rng.randint(1, 4) if "shown" in kind else 1
    )
    dots = storyboard(path) if "shown" in kind else None
    answer = f"<answer> {answer_of(board, path)} </answer>"
    if "think" in kind:
        words = f"<think> Follow the dot. <parser> {PARSER} </parser> </think>".split()
        words = words[: rng.randint(1, len(words))] if "part" in kind else words
        return board, dots, question_of(names, path), [(" ".join(words), 0), (" " + answer, 1)]
    return board, dots, question_of(names, path), [(answer, 1)]


PHASES = [  # (steps, the lessons of a batch in turn). First to see, to name places and to move once
    (
        5000,
        [
            "look",
            "look",
            "where",
            "steplook",
            "steplook",
            "question",
            "question",
            "dots",
            "dotlook",
            "step",
        ],
    ),
    # to read storyboards, and to try questions of any length, at which it stays at chance
    (
        800,
        [
            "look",
            "dotlook",
            "dotlook",
            "steplook",
            "question",
            "think",
            "any",
            "dots",
            "think any",
            "step",
        ],
    ),
    # to move once after any part of the think text: difficulty-aware data has what the base solves at once answered after it
    (
        1300,
        [
            "look",
            "dotlook",
            "part think",
            "part think",
            "question",
            "think",
            "dots",
            "part think",
            "part think",
            "think",
        ],
    ),
    # to answer from a storyboard that it is shown: latents in the space of its vision embeddings rest on its reading those
    (
        1500,
        [
            "dotlook",
            "shown",
            "part think",
            "shown",
            "question",
            "think",
            "shown",
            "shown",
            "shown part think",
            "shown think",
        ],
    ),
]


def make_tokenizer():
    """A byte-level BPE with Qwen's special tokens and chat template, trained on the toy's own texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(seed)
    texts = [
        f"<think> Follow the dot. <parser> {PARSER} </parser> </think> You are a helpful assistant. system user"
    ] * 50
    for i in range(4000):
        _, _, question, parts = lesson(PHASES[0][1][i % 10], rng)
        texts.append("assistant\n" + question + "".join(text for text, _ in parts))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        additional_special_tokens=SPECIAL[1:],
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
    )


def make_vlm(tokenizer):
    """A Qwen2.5-VL of 1.3 M parameters with random weights and spare embedding rows, as the real one has."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    at = tokenizer.convert_tokens_to_ids
    torch.manual_seed(seed)
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=dict(
                vocab_size=576,
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=32768,
                rms_norm_eps=1e-6,
                initializer_range=0.04,
                bos_token_id=at("<|endoftext|>"),
                eos_token_id=at("<|im_end|>"),
                pad_token_id=at("<|endoftext|>"),
                # mRoPE gives height and width the slower frequencies: a small theta lets them tell cells apart
                rope_parameters=dict(rope_type="default", rope_theta=20.0, mrope_section=[4, 6, 6]),
            ),
            vision_config=dict(
                depth=2,
                hidden_size=64,
                intermediate_size=192,
                num_heads=4,
                out_hidden_size=128,
                patch_size=14,
                window_size=112,
                fullatt_block_indexes=[1],
                initializer_range=0.04,
            ),
            image_token_id=at("<|image_pad|>"),
            video_token_id=at("<|video_pad|>"),
            vision_start_token_id=at("<|vision_start|>"),
            vision_end_token_id=at("<|vision_end|>"),
            tie_word_embeddings=False,
        )
    )


class Lessons:
    """Batches of lessons. A board is nine 28 px cells, each four patches, so its pixels are a look-up in an atlas."""

    def __init__(self, vlm, tokenizer, processor):
        self.vlm, self.tokenizer = vlm, tokenizer
        patches = lambda images: processor(images=images, return_tensors="pt")["pixel_values"]  # noqa: E731
        boards = [tile([draw_cell(piece, p) for p in range(9)], 3) for piece in PIECES]
        self.cells = torch.stack(
            [patches([b]).view(9, 4, -1) for b in boards]
        )  # (pieces, places, 4, 1176)
        strips = [tile([draw_panel(p)] * 4, 2) for p in range(9)]
        self.panels = torch.stack(
            [patches([s]).view(4, 4, -1)[0] for s in strips]
        )  # (places, 4, 1176)
        self.prompts = {}

    def prompt(self, grids):
        """Ids before and after the question, and positions of any length, for images of these grids."""
        if grids not in self.prompts:
            content = [{"type": "image"} for _ in grids] + [{"type": "text", "text": "\x00"}]
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            before, after = (self.tokenizer(t)["input_ids"] for t in text.split("\x00"))
            pad, left = self.vlm.config.image_token_id, list(grids)
            before = [
                i
                for t in before
                for i in ([pad] * (math.prod(left.pop(0)) // 4) if t == pad else [t])
            ]
            ids = torch.tensor(before + [0] * 400)
            self.prompts[grids] = before, after, positions(self.vlm, ids, grids)
        return self.prompts[grids]

    def batch(self, n, kinds, rng):
        """ids (B, T), labels (B, T), pos (3, B, T), pixels, grids; right-padded."""
        rows, pixels, all_grids = [], [], []
        for i in range(n):
            board, dots, question, parts = lesson(kinds[i % len(kinds)], rng)
            grids = ()
            if board:
                pixels.append(self.cells[[PIECES.index(p) for p in board], range(9)].flatten(0, 1))
                grids += ((1, 6, 6),)
            if dots:
                pixels.append(self.panels[dots].flatten(0, 1))
                grids += ((1, 4, 4),)
            before, after, pos = self.prompt(grids)
            ids = before + self.tokenizer(question)["input_ids"] + after
            labels = [IGNORE] * len(ids)
            for text, has_loss in parts + [(self.tokenizer.eos_token, 1)]:
                t = self.tokenizer(text)["input_ids"]
                ids, labels = ids + t, labels + (t if has_loss else [IGNORE] * len(t))
            rows.append((torch.tensor(ids), torch.tensor(labels), pos[:, : len(ids)].T))
            all_grids += grids
        pad = torch.nn.utils.rnn.pad_sequence
        ids, labels, pos = (
            pad(x, batch_first=True, padding_value=v) for x, v in zip(zip(*rows), (0, IGNORE, 0))
        )
        return ids, labels, pos.permute(2, 0, 1), torch.cat(pixels), torch.tensor(all_grids)


def train_base():
    """Rebuild toy/base, or go on with it at first_phase."""
    began = time.time()
    torch.set_num_threads(threads)
    if first_phase:
        vlm, tokenizer = load_vlm(base_folder)
        vlm.train()
    else:
        tokenizer = make_tokenizer()
        vlm = make_vlm(tokenizer)
    processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=1280 * 28 * 28)
    lessons = Lessons(vlm, tokenizer, processor)
    print(f"{sum(p.numel() for p in vlm.parameters()):,} parameters, {len(tokenizer)} tokens")
    for phase in range(first_phase, len(PHASES)):
        train_phase(vlm, lessons, phase)
        vlm.save_pretrained(base_folder)
        tokenizer.save_pretrained(base_folder)
        processor.save_pretrained(base_folder)
    print(f"wrote {base_folder} in {(time.time() - began) / 60:.0f} minutes")


def train_phase(vlm, lessons, phase):
    """Plain supervised training on one phase's lessons, with its own cosine schedule."""
    steps, kinds = round(PHASES[phase][0] * base_scale), PHASES[phase][1]
    rng = random.Random(seed + phase)
    optimizer = torch.optim.AdamW(
        vlm.parameters(), lr=base_lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    bar = tqdm(range(steps), unit="step", desc=f"base, phase {phase + 1}", mininterval=1)
    for step in bar:
        lr = (
            base_lr
            * min(1, (step + 1) / 200)
            * (0.5 * (1 + math.cos(math.pi * step / steps)) * 0.98 + 0.02)
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        ids, labels, pos, pixels, grids = lessons.batch(base_batch, kinds, rng)
        vision = vlm.model.visual(pixels, grid_thw=grids).pooler_output
        h = vlm.model.language_model(
            inputs_embeds=embed(vlm, ids, vision), position_ids=pos, use_cache=False
        ).last_hidden_state
        on = labels[:, 1:] != IGNORE
        logits = vlm.lm_head(h[:, :-1][on]).float()
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:][on])
        # nothing else holds the scale of the merger: keep the embeddings near one per dimension, as Qwen's are
        (loss + 0.01 * (vision.pow(2).mean() - 1).relu()).backward()
        torch.nn.utils.clip_grad_norm_(vlm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            right = (logits.argmax(-1) == labels[:, 1:][on]).split(on.sum(1).tolist())
            by = {
                k: np.mean(
                    [
                        float(r.float().mean())
                        for i, r in enumerate(right)
                        if kinds[i % len(kinds)] == k
                    ]
                )
                for k in dict.fromkeys(kinds)
            }
            bar.write(
                f"step {step + 1} loss {loss:.3f}, tokens right: "
                + " ".join(f"{k} {v:.2f}" for k, v in by.items())
            )


def write_data():
    """Write the three splits."""
    for split, n in (("train", n_train), ("val", n_val), ("test", n_test)):
        write_split(Path(data_folder), split, n)


if __name__ == "__main__":
    start(data=write_data, base=train_base)
