"""In which small world can visual latents matter? Its data, and a tiny Qwen2.5-VL that sees it.

A 3 x 3 board of coloured shapes. "Start at nw. Moves: mirror, down, flip. Which two pieces does
the dot reach last?" The auxiliary image is a 2 x 2 storyboard: four empty boards that show the dot
after each move (the start stands in where there are fewer than four). A move is an easy function of
the place before it; three in a row are not easy in one pass of a four-layer decoder. The answer
names two of nine pieces, so a guess is right once in 72.

    python toy.py data     write out/toy/{train,val,test}.jsonl and their images
    python toy.py data --form=steps --data_folder=out/steps     as a chain of thought: a span and a
                           panel per move, whose texts name the move and not where the dot is
    python toy.py data --form=named --data_folder=out/named     the same, each span after its move
    python toy.py data --form=place --data_folder=out/place     "Where is the dot?": one word
    python toy.py data --longest=8 --data_folder=out/long       up to 8 moves, a storyboard for each
                           four of them
    python toy.py edits --longest=8 --data_folder=out/long      edits.jsonl: pairs of questions that
                           differ in one thing
    python toy.py base     rebuild toy/base, the tiny Qwen2.5-VL (26 minutes on two cores)
"""

import math
import random
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence

from data import LATENT_SPAN
from files import naming, write_lines
from launch import Progress, check_choices, claim, start
from model import IGNORE, embed, load_vlm, positions

# --------------------------------------------------------------------------------------------------
seed = 12345  # of the data and of the base
data_folder = "out/toy"  # written by data
form = "storyboard"  # one picture of all moves; steps, named: one per move; place: another question
n_train = 4000  # examples
longest = 4  # moves; above four, there is a storyboard for each four
n_val = 200
n_test = 1000
n_edits = 100  # pairs of each kind, written by edits
base_folder = "toy/base"  # written by base
base_scale = 1.0  # multiplies the number of steps
base_batch = 30  # lessons per step
base_lr = 1e-3  # at 2e-3 it never learns to relate a place to a cell
first_phase = 0  # 1 to 4: go on from base_folder, as the earlier phases left it
threads = 2  # of the CPU, for base
# --------------------------------------------------------------------------------------------------

# the world

CELL = 28  # pixels: one merged vision token
# fmt: off
COLOURS = {
    "red":    "#d62728", "green":  "#1f9a2f", "blue":   "#1f4fd6", "yellow": "#f0d000",
    "purple": "#8a2be2", "black":  "#202020", "orange": "#ff8c1a", "pink":   "#ff8fc8",
    "cyan":   "#20c8e0", "brown":  "#7a4a1e",
}
SHAPES = ["circle", "square", "triangle", "diamond", "cross", "ring"]
PIECES = [(colour, shape) for colour in COLOURS for shape in SHAPES]
PLACES = ["nw", "n", "ne", "w", "mid", "e", "sw", "s", "se"]  # reading order
# The ground of a cell tells its place, as the squares of a chess board do: columns go from warm to
# cold, and rows darken downwards.
GROUNDS = [(255, 225, 190), (225, 245, 225), (190, 220, 255)]  # by column
SHADES = (1, 0.8, 0.6)  # by row
MOVES = {  # (row, column) -> (row, column)
    "right":     lambda r, c: (r, (c + 1) % 3),
    "down":      lambda r, c: ((r + 1) % 3, c),
    "mirror":    lambda r, c: (r, 2 - c),
    "flip":      lambda r, c: (2 - r, c),
    "clockwise": lambda r, c: (c, 2 - r),
    "swap":      lambda r, c: (c, r),
}
# fmt: on
PARSER = "four small boards, each with the dot one move later"
FOLLOW = "Follow the dot."
SPAN = f"{LATENT_SPAN} <parser> {PARSER} </parser>"
THINK = f"<think> {FOLLOW} <parser> {PARSER} </parser> </think>"  # without latents


def move(place, name):
    """The place (0 to 8) that a move takes a place to."""
    row, column = MOVES[name](*divmod(place, 3))
    return 3 * row + column


def new_board(rng):
    """Nine pieces in reading order, no two of one colour."""
    return [(colour, rng.choice(SHAPES)) for colour in rng.sample(list(COLOURS), 9)]


def new_path(rng, n_moves):
    """The names of moves that each change the place, and the places on the way (n_moves + 1)."""
    path, names = [rng.randrange(9)], []
    for _ in range(n_moves):
        here = path[-1]
        name = rng.choice([name for name in MOVES if move(here, name) != here])
        names.append(name)
        path.append(move(here, name))
    return names, path


def walk(place, names):
    """The places from a place on, after each move."""
    path = [place]
    for name in names:
        path.append(move(path[-1], name))
    return path


def storyboard(path):
    """The places of four dots: after each of the last moves; of fewer moves, the start first."""
    first = len(path) - 4
    return [path[max(0, first + i)] for i in range(4)]


def chapters(path):
    """A long path in parts of four moves, each with the place that it starts from."""
    return [path[i : i + 5] for i in range(0, len(path) - 1, 4)]


def question_of(names, path, asked="Which two pieces does the dot reach last?"):
    moves = ", ".join(names)
    return f"Start at {PLACES[path[0]]}. Moves: {moves}. {asked}"


def steps_of(names):
    """The think text of a picture per move: if it said where the dot is, text alone would do."""
    step = "{name}. {span}" if form == "named" else "{span} {name}."
    return " ".join(step.format(name=name, span=LATENT_SPAN) for name in names)


def answer_of(board, path):
    names = [" ".join(board[place]) for place in path[-2:]]
    return ", ".join(names)


# --------------------------------------------------------------------------------------------------
# its pictures


def draw_cell(piece, place):
    """A 28 px cell: the ground of its place, and a piece on it."""
    row, column = divmod(place, 3)
    shade = SHADES[row]
    ground = tuple(int(v * shade) for v in GROUNDS[column])
    cell = Image.new("RGB", (CELL, CELL), ground)
    draw = ImageDraw.Draw(cell)
    colour, shape = COLOURS[piece[0]], piece[1]
    a, b = 5, 22  # a piece's first and last pixel in the cell
    middle = (a + b) // 2
    if shape == "circle":
        draw.ellipse((a, a, b, b), fill=colour)
    elif shape == "square":
        draw.rectangle((a, a, b, b), fill=colour)
    elif shape == "triangle":
        draw.polygon([(middle, a), (b, b), (a, b)], fill=colour)
    elif shape == "diamond":
        draw.polygon([(middle, a), (b, middle), (middle, b), (a, middle)], fill=colour)
    elif shape == "cross":
        draw.rectangle((middle - 2, a, middle + 2, b), fill=colour)
        draw.rectangle((a, middle - 2, b, middle + 2), fill=colour)
    else:
        draw.ellipse((a, a, b, b), outline=colour, width=4)
    return cell


def draw_panel(place):
    """A 28 px empty board with the dot at one place."""
    panel = Image.new("RGB", (CELL, CELL), "#ffffff")
    draw = ImageDraw.Draw(panel)
    first, last = 2, 26
    for at in (2, 10, 18, 26):  # the lines between and around three cells of 8 px
        draw.line((at, first, at, last), fill="#999999")
        draw.line((first, at, last, at), fill="#999999")
    row, column = divmod(place, 3)
    x, y = 3 + 8 * column, 3 + 8 * row
    draw.ellipse((x, y, x + 6, y + 6), fill="#c00000")
    return panel


def tile(cells, columns):
    """Paste 28 px cells in reading order."""
    rows = len(cells) // columns
    image = Image.new("RGB", (CELL * columns, CELL * rows))
    for i, cell in enumerate(cells):
        row, column = divmod(i, columns)
        image.paste(cell, (CELL * column, CELL * row))
    return image


def draw_board(board):
    return tile([draw_cell(piece, place) for place, piece in enumerate(board)], 3)


def draw_storyboard(path):
    return tile([draw_panel(place) for place in storyboard(path)], 2)


# --------------------------------------------------------------------------------------------------
# its data


def moves_of(i):
    """How many moves example i has: two in five can be answered at once, the others take turns."""
    if i % 5 in (0, 4):
        return 1
    turn = 3 * (i // 5) + i % 5 - 1
    return 2 + turn % (longest - 1)


def example(folder, name, board, names, path):
    """A row of a board, the names of moves and the places on the way; writes its images.

    name: of its images, below `folder`, without their ending.
    """
    draw_board(board).save(folder / f"{name}.png")
    question, answer = question_of(names, path), answer_of(board, path)
    if form == "place":
        question, answer = question_of(names, path, "Where is the dot?"), PLACES[path[-1]]
    picture_a_move = form in ("steps", "named")
    if picture_a_move:
        pictures, think = [draw_panel(place) for place in path[1:]], steps_of(names)
    else:
        pictures = [draw_storyboard(part) for part in chapters(path)]
        think = " ".join([FOLLOW] + [SPAN] * len(pictures))
    aux = []
    for k, picture in enumerate(pictures):
        several = picture_a_move or longest > 4
        aux.append(f"{name}-aux-{k}.png" if several else f"{name}-aux.png")
        picture.save(folder / aux[-1])
    return {
        "id": name.replace("/", "-"),
        "images": [f"{name}.png"],
        "question": question,
        "answer": answer,
        "response": f"<think> {think} </think> <answer> {answer} </answer>",
        "aux_images": aux,
        "category": f"{len(names)} moves",
    }


def write_split(folder, split, n):
    """Write n examples and their images from the seed."""
    rng = random.Random(f"{seed}/{split}")
    (folder / split).mkdir(parents=True, exist_ok=True)
    # pictures are written over: rows of other ones must not stand beside them
    (folder / f"{split}.jsonl").unlink(missing_ok=True)
    rows = []
    for i in Progress(range(n), desc=split, unit="example"):
        board = new_board(rng)
        names, path = new_path(rng, moves_of(i))
        with naming(folder / split):
            rows.append(example(folder, f"{split}/{i}", board, names, path))
    write_lines(folder / f"{split}.jsonl", rows)


def write_data():
    """Write the three splits."""
    check_choices(globals(), form=("storyboard", "steps", "named", "place"))
    claim(data_folder)
    for split, n in (("train", n_train), ("val", n_val), ("test", n_test)):
        write_split(Path(data_folder), split, n)


# --------------------------------------------------------------------------------------------------
# pairs of questions that differ in one thing: do latents and answers follow it? (edits.py)

EDITS = ("start", "move", "piece", "elsewhere")


def edited(kind, board, names, path, rng):
    """(board, names, path) with one edit: another start or move, which change storyboard and
    answer, another last piece, which changes the answer alone, or one that nothing depends on."""
    if kind in ("start", "move"):
        start, names = path[0], list(names)
        if kind == "start":
            start = rng.randrange(9)
        else:
            names[rng.randrange(len(names))] = rng.choice(list(MOVES))
        return board, names, walk(start, names)
    places = [path[-1]] if kind == "piece" else sorted(set(range(9)) - set(path[-2:]))
    place = rng.choice(places)
    colour = rng.choice(sorted(set(COLOURS) - {colour for colour, _ in board}))
    return [*board[:place], (colour, rng.choice(SHAPES)), *board[place + 1 :]], names, path


def new_pair(kind, n_moves, rng):
    """Two (board, names, path) that differ in an edit of a kind."""
    while True:
        one = new_board(rng), *new_path(rng, n_moves)
        board, _, path = other = edited(kind, *one, rng)
        moves = all(a != b for a, b in zip(path, path[1:]))  # each of them, as in all questions
        changes = answer_of(board, path) != answer_of(one[0], one[2])
        if moves and changes == (kind != "elsewhere"):
            return one, other


def write_edits():
    """Write edits.jsonl: for each kind n_edits pairs of questions of several moves."""
    check_choices(globals(), form=("storyboard", "steps", "named"))  # whose answers are pieces
    claim(data_folder)
    folder, rng = Path(data_folder), random.Random(f"{seed}/edits")
    (folder / "edits").mkdir(parents=True, exist_ok=True)
    (folder / "edits.jsonl").unlink(missing_ok=True)
    rows = []
    for i in Progress(range(n_edits), desc="edits", unit="pair of each kind"):
        for kind in EDITS:
            both = new_pair(kind, 2 + i % (longest - 1), rng)
            for side, (board, names, path) in zip("ab", both):
                row = example(folder, f"edits/{kind}-{i}-{side}", board, names, path)
                rows.append(row | {"pair": f"{kind}-{i}", "category": kind})
    write_lines(folder / "edits.jsonl", rows)


# --------------------------------------------------------------------------------------------------
# what the base learns: to see boards and storyboards, and to make one move. Several are left to it


class Lesson(NamedTuple):
    """A text that the base is trained on."""

    board: list | None  # its first image
    shown: list  # the four places of each storyboard that is an image after it
    question: str
    parts: list  # (text, whether the loss falls on it), one after another
    written: tuple = ()  # of each storyboard that has its pads in a part


# around what is written: a base that knows several pairs reads between latents' own marks, too
MARKS = ("vision", "object_ref", "box", "quad")

# A lesson's name is what it asks:
#   look      the piece at each place; where: the place of each piece
#   step      one move; steplook: one move, and the piece there
#   dots      where a storyboard's dots are; dotlook: which pieces are under them
# and in the words of question_lesson the toy's own question, in that of `question` of one move and
# answered at once.
# fmt: off
# (steps, the lessons of a batch in turn)
PHASES = [
    # first to see, to name places and to move once
    (5000, ["look", "look", "where", "steplook", "steplook",
            "question", "question", "dots", "dotlook", "step"]),
    # to read storyboards, and to try questions of any length, at which it stays at chance
    (800,  ["look", "dotlook", "dotlook", "steplook", "question",
            "think", "any", "dots", "think any", "step"]),
    # to move once after any part of the think text: difficulty-aware data has what the base solves
    # at once answered after it
    (1300, ["look", "dotlook", "part think", "part think", "question",
            "think", "dots", "part think", "part think", "think"]),
    # to answer from a storyboard that it is shown: latents in the space of its vision embeddings
    # rest on its reading those
    (1500, ["dotlook", "shown", "part think", "shown", "question",
            "think", "shown", "shown", "shown part think", "shown think"]),
    # and where it writes: latents stand among the words of its own response
    (1500, ["dotlook", "shown", "part think", "written", "written", "question",
            "think", "written long", "written", "written long"]),
]
# fmt: on


def new_lesson(kind, rng):
    """A Lesson of a kind in PHASES."""
    # drawn for every kind alike, needed or not
    board = new_board(rng)
    steps = [(rng.randrange(9), rng.choice(list(MOVES))) for _ in range(9)]
    dots = [rng.randrange(9) for _ in range(4)]
    names = [" ".join(piece) for piece in board]

    if kind == "look":  # relating a named place to a cell is the slow part: all nine in one text
        pairs = [(PLACES[p], names[p]) for p in rng.sample(range(9), 9)]
        return Lesson(board, [], "List the pieces.", fill_in(pairs))
    if kind == "where":  # the way back shows the tower that the ground matters
        pairs = []
        for p in rng.sample(range(9), 9):
            colour, shape = board[p]
            pairs.append((colour, f"{shape} {PLACES[p]}"))
        return Lesson(board, [], "Find the pieces.", fill_in(pairs))
    if kind == "step":
        pairs = [(f"{PLACES[p]} {name}", PLACES[move(p, name)]) for p, name in steps]
        return Lesson(None, [], "Make single moves.", fill_in(pairs))
    if kind == "steplook":
        pairs = [(f"{PLACES[p]} {name}", names[move(p, name)]) for p, name in steps]
        return Lesson(board, [], "Make single moves and look.", fill_in(pairs))
    if kind == "dots":
        places = "".join(f" {PLACES[p]}," for p in dots)
        return Lesson(None, [dots], "Where are the dots?", [(places, 1)])
    if kind == "dotlook":
        pieces = "".join(f" {names[p]}," for p in dots)
        return Lesson(board, [dots], "Which pieces are under the dots?", [(pieces, 1)])
    return question_lesson(kind.split(), board, rng)


def fill_in(pairs):
    """The parts of a text that gives the first of each pair and asks for the second."""
    parts = []
    for given, asked in pairs:
        parts += [(f" {given}", 0), (f" {asked},", 1)]
    return parts


def question_lesson(words, board, rng):
    """A question of the toy: of one move, or of `any` number; with its storyboard `shown`.

    Answered at once, or after the `think` text, or after `part` of that; or after a think text with
    its storyboard `written`, or with the two of a `long` path.
    """
    n_moves = 1
    if "any" in words:
        n_moves = rng.randint(2, 4)
    elif "long" in words:
        n_moves = rng.randint(5, 8)
    elif "shown" in words or "written" in words:
        n_moves = rng.randint(1, 4)
    names, path = new_path(rng, n_moves)
    shown = [storyboard(path)] if "shown" in words else []
    question = question_of(names, path)
    answer = f"<answer> {answer_of(board, path)} </answer>"
    if "written" in words:
        written = [storyboard(part) for part in chapters(path)]
        think = " ".join(["<think>", FOLLOW, *written_spans(len(written), rng), "</think>"])
        return Lesson(board, [], question, [(think, 0), (" " + answer, 1)], written)
    if "think" not in words:
        return Lesson(board, shown, question, [(answer, 1)])
    think = THINK.split()
    if "part" in words:
        think = think[: rng.randint(1, len(think))]
    return Lesson(board, shown, question, [(" ".join(think), 0), (" " + answer, 1)])


def written_spans(n, rng):
    """n spans of an example, with the pads of a storyboard and some marks for latents."""
    for _ in range(n):
        mark = rng.choice(MARKS)
        pads = f"<|{mark}_start|>{'<|image_pad|>' * 4}<|{mark}_end|>"
        yield SPAN.replace(LATENT_SPAN, pads)


# --------------------------------------------------------------------------------------------------
# the base before it learns: tokenizer and random weights

# fmt: off
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]
CHAT_TEMPLATE = (  # the ChatML prompt of Qwen2.5-VL, for text and images
    "{% if messages[0]['role'] != 'system' %}"
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "{% for m in messages %}"
        "<|im_start|>{{ m['role'] }}\n"
        "{% if m['content'] is string %}{{ m['content'] }}"
        "{% else %}"
            "{% for part in m['content'] %}"
                "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
                "{% else %}{{ part['text'] }}{% endif %}"
            "{% endfor %}"
        "{% endif %}"
        "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# fmt: on


def make_tokenizer():
    """A byte-level BPE with Qwen's special tokens and chat template, trained on the toy's texts."""
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(seed)
    texts = [f"{THINK} You are a helpful assistant. system user"] * 50
    kinds = PHASES[0][1]
    for i in range(4000):
        lesson = new_lesson(kinds[i % 10], rng)
        answer = "".join(part for part, _ in lesson.parts)
        texts.append(f"assistant\n{lesson.question}{answer}")

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
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
    """A Qwen2.5-VL of 1.0 M random weights, with spare embedding rows, as the real one has."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    at = tokenizer.convert_tokens_to_ids
    text = dict(
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
        # mRoPE gives height and width the slower frequencies: a small theta tells cells apart
        rope_parameters=dict(rope_type="default", rope_theta=20.0, mrope_section=[4, 6, 6]),
    )
    vision = dict(
        depth=2,
        hidden_size=64,
        intermediate_size=192,
        num_heads=4,
        out_hidden_size=128,
        patch_size=14,
        window_size=112,
        fullatt_block_indexes=[1],
        initializer_range=0.04,
    )
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=at("<|image_pad|>"),
        video_token_id=at("<|video_pad|>"),
        vision_start_token_id=at("<|vision_start|>"),
        vision_end_token_id=at("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    return Qwen2_5_VLForConditionalGeneration(config)


# --------------------------------------------------------------------------------------------------
# its training

BOARD_GRID, STORYBOARD_GRID = (1, 6, 6), (1, 4, 4)  # (t, h, w) in patches, four of them a cell
MOST_TOKENS = 400  # of a text after its images


class Lessons:
    """Batches of lessons. A picture is made of few cells: its pixels are looked up in an atlas."""

    def __init__(self, vlm, tokenizer, processor):
        self.vlm, self.tokenizer = vlm, tokenizer
        self.prompts = {}

        def patches(image):
            return processor(images=[image], return_tensors="pt")["pixel_values"]

        # a cell is four patches of 3 x 2 x 14 x 14 = 1,176 numbers
        boards = [patches(draw_board([piece] * 9)) for piece in PIECES]
        self.cells = torch.stack(boards).view(-1, 9, 4, 1176)  # (pieces, places, 4, 1176)
        # a path of one place stands on all four panels: the first will do
        storyboards = [patches(draw_storyboard([place])) for place in range(9)]  # (16, 1176)
        self.panels = torch.stack([x[:4] for x in storyboards])  # (places, 4, 1176)

    def prompt(self, grids):
        """Ids before and after the question, and positions of any length, for images of `grids`."""
        if grids in self.prompts:
            return self.prompts[grids]
        content = [{"type": "image"} for _ in grids] + [{"type": "text", "text": "\x00"}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        one_pad_each, after = self.tokenizer(text.split("\x00"))["input_ids"]
        before, images = [], iter(grids)
        for t in one_pad_each:
            n = 1
            if t == self.vlm.config.image_token_id:
                n = math.prod(next(images)) // 4  # merged tokens
            before += [t] * n
        ids = torch.tensor(before + [0] * MOST_TOKENS)
        self.prompts[grids] = before, after, positions(self.vlm, ids, grids)
        return self.prompts[grids]

    def encode(self, lesson):
        """A Lesson's ids (T), labels (T) and positions (T, 3), pixels of each image, and grids."""
        pixels, grids = [], ()
        if lesson.board:
            pieces = [PIECES.index(piece) for piece in lesson.board]
            pixels.append(self.cells[pieces, range(9)].flatten(0, 1))  # (36, 1176)
            grids += (BOARD_GRID,)
        grids += (STORYBOARD_GRID,) * len(lesson.shown)
        before, after, pos = self.prompt(grids)  # what is written has the positions of words
        for dots in (*lesson.shown, *lesson.written):
            pixels.append(self.panels[dots].flatten(0, 1))  # (16, 1176)
        grids += (STORYBOARD_GRID,) * len(lesson.written)
        ids = before + self.tokenizer(lesson.question)["input_ids"] + after
        labels = [IGNORE] * len(ids)
        for part, has_loss in [*lesson.parts, (self.tokenizer.eos_token, 1)]:
            new = self.tokenizer(part)["input_ids"]
            ids = ids + new
            labels += new if has_loss else [IGNORE] * len(new)
        pos = pos[:, : len(ids)].T
        return torch.tensor(ids), torch.tensor(labels), pos, pixels, grids

    def batch(self, n, kinds, rng):
        """ids (B, T), labels (B, T), pos (3, B, T), pixels (patches, 1176), grids (images, 3).

        Right-padded.
        """
        rows = [self.encode(new_lesson(kinds[i % len(kinds)], rng)) for i in range(n)]
        all_ids, all_labels, all_pos, all_pixels, all_grids = zip(*rows)
        ids = pad_sequence(all_ids, batch_first=True)
        labels = pad_sequence(all_labels, batch_first=True, padding_value=IGNORE)
        pos = pad_sequence(all_pos, batch_first=True).permute(2, 0, 1)
        pixels = torch.cat([x for pixels in all_pixels for x in pixels])
        grids = torch.tensor([grid for grids in all_grids for grid in grids])
        return ids, labels, pos, pixels, grids


def train_base():
    """Rebuild toy/base, or go on with it at first_phase."""
    from transformers import Qwen2VLImageProcessorPil
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of writing weights
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
    n_parameters = sum(p.numel() for p in vlm.parameters())
    print(f"{n_parameters:,} parameters, {len(tokenizer)} tokens")
    for phase in range(first_phase, len(PHASES)):
        train_phase(vlm, lessons, phase)
        for part in (vlm, tokenizer, processor):
            part.save_pretrained(base_folder)
    minutes = (time.time() - began) / 60
    print(f"wrote {base_folder} in {minutes:.0f} minutes")


def train_phase(vlm, lessons, phase):
    """Plain supervised training on one phase's lessons, with its own cosine schedule."""
    full_steps, kinds = PHASES[phase]
    steps = round(full_steps * base_scale)
    rng = random.Random(seed + phase)
    optimizer = torch.optim.AdamW(
        vlm.parameters(), lr=base_lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    bar = Progress(range(steps), unit="step", desc=f"base, phase {phase}", mininterval=1)
    for step in bar:
        ids, labels, pos, pixels, grids = lessons.batch(base_batch, kinds, rng)
        vision = vlm.model.visual(pixels, grid_thw=grids).pooler_output  # (N, d)
        h = vlm.model.language_model(
            inputs_embeds=embed(vlm, ids, vision), position_ids=pos, use_cache=False
        ).last_hidden_state  # (B, T, d)
        on = labels[:, 1:] != IGNORE  # the state at t predicts the token at t + 1
        logits = vlm.lm_head(h[:, :-1][on]).float()
        wanted = labels[:, 1:][on]
        loss = F.cross_entropy(logits, wanted)
        # nothing else holds the scale of the merger: keep the embeddings near one per dimension,
        # as Qwen's are
        too_large = (vision.pow(2).mean() - 1).relu()
        (loss + 0.01 * too_large).backward()
        torch.nn.utils.clip_grad_norm_(vlm.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            right = (logits.argmax(-1) == wanted).float()
            rows = right.split(on.sum(1).tolist())
            by_kind = tokens_right([float(row.mean()) for row in rows], kinds)
            bar.write(f"step {step + 1} loss {loss:.3f}, tokens right: {by_kind}")


def learning_rate(step, steps):
    """200 steps of warm-up, then a cosine that ends at a fiftieth of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return base_lr * min(1, (step + 1) / 200) * (cosine * 0.98 + 0.02)


def tokens_right(shares, kinds):
    """The mean share of right tokens by kind of lesson, of the shares of a batch's rows."""
    by_kind = {}
    for i, share in enumerate(shares):
        kind = kinds[i % len(kinds)]
        by_kind.setdefault(kind, []).append(share)
    means = [f"{kind} {statistics.fmean(x):.2f}" for kind, x in by_kind.items()]
    return " ".join(means)


if __name__ == "__main__":
    start(data=write_data, edits=write_edits, base=train_base)
