"""What did it say, and is that right? Kinds of outputs with a reader's value, and fuzz."""

import json
import time

import pytest
from conftest import run
from hypothesis import given, settings
from hypothesis import strategies as st

import answers
import benchmarks
import scores
import stated
import values
from options import letter_of

OPTIONS = {"A": "red", "B": "blue", "C": "green", "D": "a dark wood"}


def lettered(*texts):
    return dict(zip("ABCDEFGH", texts))


COLOURS = lettered("red", "blue", "green", "yellow")
PLACES = lettered("Europe", "Africa", "Asia")
FRUIT = lettered("red", "green")
SEASONS = lettered("spring", "summer", "autumn", "winter")
YES_NO = lettered("Yes", "No")
IN_THE_IMAGE = dict.fromkeys("ABCD", "")
DEPTH = lettered("A is closer", "B is closer")
POINTS = lettered("Point A", "Point B", "Point C", "Point D")
SAMPLES = lettered("sample B", "sample A", "the same")
NUMBERS = lettered("3", "5", "8", "12")
LENGTHS = lettered("5 cm", "10 cm", "15 cm", "20 cm")
CHINESE = lettered("红色", "蓝色", "绿色", "黄色")
AREAS = lettered("18 cm²", "36 cm²", "54 cm²", "No correct answer")

ROOTS = lettered("√3", "√2", "1", "2")
SMALL = lettered("3", "4", "5", "6")
SIDES = lettered("5", "10", "15", "20")
VEHICLES = lettered("car", "bus", "truck", "bike")

# ten outputs of each kind and what a reader takes from them; None where they name no one option
# fmt: off
KINDS = {
    "one option's text in a sentence": [
        (PLACES, "The shaded part of the map belongs to Africa.", "B"),
        (PLACES, "<answer>The country lies in Asia, the largest continent.</answer>", "C"),
        (PLACES, "This is not Europe but Africa.", "B"),
        (PLACES, "Both Europe and Asia are shaded.", None),
        (PLACES, "It isn't Europe.", None),
        (SEASONS, "With bare trees and snow on the roofs, it was taken in Winter.", "D"),
        (COLOURS, "The bus is blue, like the one in panel A.", "B"),
        (lettered("red", "dark red", "light red"), "The door of the house is dark red.", "B"),
        (lettered("12", "13", "21"), "Counting all boxes on the shelf, one gets 13 of them.", "B"),
        (NUMBERS, "There are 15 people in the image.", None),
    ],
    "yes and no sentences": [
        (YES_NO, "No, the cat is not inside the box.", "B"),
        (YES_NO, "Yes, there is no one else in the picture.", "A"),
        (YES_NO, "**No**, the person holds no umbrella.", "B"),
        (YES_NO, "There is no dog in the image.", "B"),
        (YES_NO, "The answer to the question is yes.", "A"),
        (YES_NO, "<answer>No, the light is red.</answer>", "B"),
        (YES_NO, "Yes and no.", None),
        (YES_NO, "The dog is asleep.", None),
        (lettered("Yes, it is inside", "No, it is outside"), "No, it sits on the roof.", "B"),
        (lettered("True", "False"), "False. The bars are of different heights.", "B"),
    ],
    "a list of the options is no declaration": [
        (FRUIT, "Let me check each option: (A) red: no. (B) green: yes. It is: (B) green", "B"),
        (COLOURS, "Going through every choice: A. red: no. B. blue: yes.\nFinal answer: B", "B"),
        (COLOURS, "We check each answer: (A) red, no; (B) blue, yes.\n\nHence B.", "B"),
        (COLOURS, "Options:\nA. red\nB. blue\nC. green\nD. yellow\nThe flag is blue.", "B"),
        (COLOURS, "A. red\nB. blue\nC. green\nD. yellow\n\nThe car has a bright colour.", None),
        (COLOURS, "Here is each option: (A) red (B) blue (C) green (D) yellow", None),
        (COLOURS, "Let's test each option: (A) red: no. (B) blue: no.", None),
        (COLOURS, "Option A: the roof is red.\nOption B: the door is blue.\nThus, option B.", "B"),
        (COLOURS, "The answer options are:\nA. red\nB. blue\n\nThe answer is B.", "B"),
        (COLOURS, "To answer this, see the options: (A) red, (B) blue. The tram is green.", "C"),
    ],
    "A is a letter before a verb, and no article": [
        (DEPTH, "A is closer. Point B is further back.", "A"),
        (IN_THE_IMAGE, "A is closer. Point B is further back.", "A"),
        (POINTS, "Point B is closer to the camera than A.", "B"),
        (IN_THE_IMAGE, "A and B are of the same length.", None),
        (IN_THE_IMAGE, "Box A is heavier than it looks.", "A"),
        (IN_THE_IMAGE, "Box A and Box B are both full.", None),
        (IN_THE_IMAGE, "Path A is shorter than path B.", "A"),
        (IN_THE_IMAGE, "A piece of the puzzle is missing, and a corner fits. So it is B.", "B"),
        (IN_THE_IMAGE, "A man is standing next to B.", None),
        (COLOURS, "A blue car", "B"),
    ],
    "the answer, then an explanation": [
        (COLOURS, "C. green\nBecause the sign stands in row B.", "C"),
        (COLOURS, "B. blue\n\nThe jersey of the player in lane A is blue.", "B"),
        (COLOURS, "**C. green**\n\nThe arrow labelled B points at the roof.", "C"),
        (COLOURS, "(A) red\n\nThe line through B and C is red.", "A"),
        (COLOURS, "D\nThe other shapes, A to C, all have a hole.", "D"),
        (IN_THE_IMAGE, "(D). Shapes A, B and C have a hole.", "D"),
        (COLOURS, "C. It is the colour of the wall in B.", "C"),
        (COLOURS, "green. The sign in row B says so.", "C"),
        (COLOURS, "A. red\nB. blue", None),
        (COLOURS, "C. green\nWait, the label says otherwise. The answer is B.", "B"),
    ],
    "the value of one option in a box": [
        (LENGTHS, r"\boxed{10 \, \text{cm}}", "B"),
        (LENGTHS, r"so $$\boxed{15~\mathrm{cm}}$$", "C"),
        (LENGTHS, r"\boxed{15}", "C"),
        (LENGTHS, r"\boxed{15 m}", None),
        (lettered("60°", "120°"), r"\boxed{120^{\circ}}", "B"),
        (lettered("3:4", "4:3"), r"\boxed{\frac{4}{3}}", "B"),
        (lettered("24π", "48π"), r"\boxed{48\pi \text{ cm}^2}", "B"),
        (lettered("√2", "√3", "2√3"), r"\boxed{2\sqrt{3}}", "C"),
        (lettered("10 cm", "10 m"), r"\boxed{10}", None),
        (lettered("20 cm^2", "20 cm^3"), r"\boxed{20\text{ cm}^3}", "B"),
    ],
    "the last line is an option whose text holds another letter": [
        (SAMPLES, "Comparing them, the warmer one is:\nA. sample B", "A"),
        (SAMPLES, "The one with more energy is\n\n**B. sample A**", "B"),
        (SAMPLES, "The warmer one is sample A.", "B"),
        (SAMPLES, "The answer is (A) sample B.", "A"),
        (SAMPLES, "We compare A with B.\n(C) the same", "C"),
        (lettered("B to A", "A to B"), "Heat flows to the colder body.\nB. A to B", "B"),
        (lettered("graph C", "graph A", "graph B"), "The rising one is\n**C. graph B**", "C"),
        (lettered("vitamin D", "vitamin C"), "The fruit is rich in vitamin C.", "B"),
        (POINTS, "The corresponding point is (B) Point B.", "B"),
        (SAMPLES, "A. sample B\nB. sample A\nC. the same", None),
    ],
    "Chinese, full-width letters": [
        (CHINESE, "因此，正确答案是C。", "C"),
        (CHINESE, "Ｂ", "B"),
        (CHINESE, "（Ｃ）", "C"),
        (CHINESE, "答案：B", "B"),
        (CHINESE, "根据分析，A错误，C错误，故选D。", "D"),
        (CHINESE, "选项A是屋顶的颜色，选项B是门的颜色。所以答案选B。", "B"),
        (CHINESE, "答案不是A，而是C。", "C"),
        (CHINESE, "图中汽车的颜色是绿色。", "C"),
        (CHINESE, "答案是B或C。", None),
        (CHINESE, "抱歉，我无法判断是A。", None),
    ],
    "a box with a step, then the letter": [
        (COLOURS, r"The area is $\boxed{10}$. Hence the answer is (C).", "C"),
        (COLOURS, r"We get \boxed{42}, which matches option B.", "B"),
        (COLOURS, "x = \\boxed{3}\n\nThe correct option is D.", "D"),
        (COLOURS, "\\boxed{\\text{the roof}}\n\nC", "C"),
        (COLOURS, r"In total \boxed{7}; therefore, (A).", "A"),
        (COLOURS, r"\boxed{A}. Wait, that is wrong. The answer is C.", "C"),
        (COLOURS, r"\boxed{C}, as A is too small.", "C"),
        (COLOURS, r"B is the midpoint, so AB is \boxed{10}.", None),
        (COLOURS, r"\boxed{10}. The answer is A or B.", None),
        (NUMBERS, r"\boxed{\textbf{(B)}\ 5}", "B"),
    ],
    "the answer alone before a closing fence or tag": [
        (COLOURS, "The tram has the colour of the sign.\n```\nB\n```", "B"),
        (COLOURS, "It could be A.\n```text\nD\n```\n", "D"),
        (COLOURS, "A and C are cut.\n\nB\n</answer>", "B"),
        (COLOURS, "A, B or C?\n(C)\n</s>", "C"),
        (COLOURS, "<answer>\n```\nA\n```\n</answer>", "A"),
        (COLOURS, "We saw A first.\n\\[\nB\n\\]", "B"),
        (COLOURS, "So the final choice is D.\n<|im_end|>", "D"),
        (COLOURS, '```json\n{"answer": "B", "reason": "A is the roof"}\n```', "B"),
        (COLOURS, "<think>A?</think><answer><|begin_of_box|>C<|end_of_box|></answer>", "C"),
        (COLOURS, "A is red, B is blue.\n<output>\nD\n</output>", "D"),
    ],
    "We-Math's template": [
        (AREAS, "<Thought process>: <<A and B are joined>> <Answer>: <<C>>", "C"),
        (AREAS, "<Thought process>: <<6 × 6 = 36>>\n<Answer>: <<B. 36 cm²>>", "B"),
        (COLOURS, "<Thought process>: <<The line AB>>\n<Answer>: <<blue>>", "B"),
        (AREAS, "<Thought process>: <The area is 54.> <Answer>: <D>", "D"),
        (AREAS, "<thought process> : <<D is the centre>> <answer> : <<b>>", "B"),
        (AREAS, "<Thought process>: A or B? <Answer>: C", "C"),
        (AREAS, "<Answer>: <<option (a)>>", "A"),
        (AREAS, "<Thought process>: <<None fits>> <Answer>: <<No correct answer>>", "D"),
        (AREAS, "<Thought process>: <<I see A>> <Answer>: <<>>", None),
        (AREAS, "<Thought process>: <<So the answer is A", None),
    ],
    "what is declared or said last": [
        (COLOURS, "The answer is A. Wait, the roof is at the back; the answer is C.", "C"),
        (COLOURS, "The answer is A.\nNo, look again.\n\nB", "B"),
        (COLOURS, "First I thought that the answer is B. But option C is correct.", "C"),
        (COLOURS, "The correct answer is D.\n\nPanel C was not considered.", "D"),
        (COLOURS, "A has two dots, B has three.\nThus, C.", "C"),
        (COLOURS, "I choose C because the wall of B is white.", "C"),
        (COLOURS, "Is the answer A? No, it is B.", "B"),
        (COLOURS, "The answer is either A or B.", None),
        (COLOURS, "The answer is C.\nThe answer is A, B, and C.", None),
        (COLOURS, "(B) is the right choice, not (A).", "B"),
    ],
    "what is denied": [
        (COLOURS, "The answer is not A.", None),
        (COLOURS, "The answer is A. Hmm, the answer is not A, it is B.", "B"),
        (COLOURS, "Neither A nor B, so the answer must be D.", "D"),
        (COLOURS, "A is incorrect, C is incorrect, so D.", "D"),
        (COLOURS, "Options A and B can be eliminated. Option C is wrong too, which leaves D.", "D"),
        (COLOURS, "Not A: too dark. Not B: too light. C it is.", "C"),
        (COLOURS, "I don't think it is B.", None),
        (COLOURS, "Correct option: B\nIncorrect options: A, C, D", "B"),
        (COLOURS, "The answer can't be B. The answer must be A.", "A"),
        (COLOURS, "The bus is green, not blue.", "C"),
    ],
    "a verdict on each option": [
        (COLOURS, "* **A:** Incorrect.\n* **B:** Correct.\n* **C:** Incorrect.", "B"),
        (COLOURS, "Check each option: A: no. B: no. C: no. D: yes, it fits.", "D"),
        (COLOURS, "A is clearly wrong.", None),
        (COLOURS, "A is not the answer, B is not the answer, C is the answer.", "C"),
        (COLOURS, "It is not A, B is correct.", "B"),
        (COLOURS, "We can eliminate A and D. Between B and C, B is better.", "B"),
        (COLOURS, "The answer is B. Wrong options are A, C and D.", "B"),
        (COLOURS, "Answer: B. No other colour is as dark.", "B"),
        (COLOURS, "The ball marked A is on the left; the one marked B is on the right.", None),
        (COLOURS, "C. green\nD is the roof.", "C"),
    ],
    "numbers among other numbers": [
        (NUMBERS, "Adding 2 and 5, one gets 7.", None),
        (NUMBERS, "There are 15 people and 3 dogs.", None),
        (NUMBERS, "The answer is 15. It is 3 times 5.", None),
        (NUMBERS, "1. Look at the shelf.\n2. There are 8 boxes.", "C"),
        (NUMBERS, "Step 1: the left bar. Step 2: the right bar. So it is 8.", "C"),
        (NUMBERS, "In 2010 there were eight of them.", "C"),
        (NUMBERS, "It takes 3.5 hours.", None),
        (NUMBERS, "Let 3x = 36, so x = 12.", "D"),
        (lettered("one", "two"), "The last one of the panels shows two dogs.", "B"),
        (lettered("20 cm^2", "20 cm^3"), r"\boxed{20\text{ cm}^{3}}", "B"),
    ],
    "refusals, questions and names": [
        (COLOURS, "I cannot determine the colour, as A and B are hidden.", None),
        (COLOURS, "I'm sorry, but I can't help with that. Option B needs more context.", None),
        (COLOURS, "It is not clear whether the answer is B.", None),
        (COLOURS, "I am unable to tell, but the answer is probably B.", "B"),
        (COLOURS, "The sign in row B is the tallest one.", None),
        (COLOURS, "A? No. B? No. C? Yes.", None),
        (NUMBERS, "A is the centre and AB is a radius, so AB is 5.", "B"),
        (NUMBERS, "∠A = 30° and A(1, 2), so AB is 5.", "B"),
        (NUMBERS, "Multiply 3 by 5, giving 15.", None),
        (COLOURS, "B B B B B B B B B B B B", None),
    ],
    "parts of expressions": [
        (SIDES, r"So BC is $5\sqrt{3}$.", None),
        (SIDES, r"So BC is $5 \sqrt { 3 }$.", None),
        (SIDES, "the area is 5π", None),
        (SMALL, "the answer is 3^n", None),
        (SMALL, "it is 3 million", None),
        (SMALL, "it is 3 1/2", None),
        (SMALL, r"the answer is 3 + \sqrt{3}", None),
        (ROOTS, "AB is 2√2", None),
        (ROOTS, "So AB is √2.", "B"),
        (SMALL, "The answer is 3 - as the picture shows.", "A"),
    ],
    "values in a sentence": [
        (LENGTHS, "So the perimeter is 20.", "D"),
        (lettered("6cm", "8cm"), "The length of AC is 6.0.", "A"),
        (lettered("45°", "60°"), "So angle x is 60 degrees.", "B"),
        (lettered("2,000", "3,000"), "The bar shows that it is 2000.", "A"),
        (SMALL, "It is not 4.", None),
        (SMALL, "Is it 4?", None),
        (SMALL, "I can not tell whether it is 4.", None),
        (SMALL, "So it is 4x.", None),
        (SIDES, "In the triangle, AB = 10 and AC = 15. We need BC.", None),
        (LENGTHS, "The length is 20 mm.", None),
    ],
    "what is stated of several": [
        (SIDES, "It is 10, or maybe 15.", None),
        (SIDES, "The width is 10 and the height is 5", None),
        (SMALL, "x = 4 (A)", None),
        (lettered("3 apples", "4 apples"), "There are 3 oranges.", None),
        (COLOURS, "It is not A, and B is the answer.", "B"),
        (COLOURS, "We can eliminate A and C, and D is the answer.", "D"),
        (IN_THE_IMAGE, "It can't be A, and C is correct.", "C"),
        (COLOURS, "It is not A and B is correct.", None),
        (COLOURS, "A and B are the answer.", None),
        (IN_THE_IMAGE, "A, B is correct", "B"),
    ],
    "articles and lists": [
        (FRUIT, "A 3-story building is visible.", None),
        (FRUIT, "A British flag.", None),
        (FRUIT, "**Answer:** A **Explanation:** it is red.", "A"),
        (lettered("UK flag", "US flag"), "A US flag", "B"),
        (lettered("The roof is red", "The roof is blue"), "A The roof is red", "A"),
        (FRUIT, "**A** Looking at the picture, one sees it.", "A"),
        (COLOURS | {"E": "No correct answer"}, "None of A, B, C and D is correct, so E", "E"),
        (COLOURS, "Only one of A and B is correct", None),
        (COLOURS, "Of A, B is correct", "B"),
        (FRUIT, "A point of interest on the map is a shop.", None),
    ],
    "articles after a colon": [
        (VEHICLES, "Answer: A bus", "B"),
        (VEHICLES, "**Answer:** A bus", "B"),
        (VEHICLES, "Answer: A yellow bus is parked.", "B"),
        (VEHICLES, "Answer: A tall man", None),
        (VEHICLES, "In the image: A man waits at the stop.", None),
        (VEHICLES, "Answer: A", "A"),
        (lettered("A cat", "A dog", "A horse"), "Answer: A brown horse", "C"),
        (FRUIT, "A note on the wall says green.", "B"),
        (lettered("blue", "red"), "A given point lies in the red region.", "B"),
        (FRUIT, "A note is on the fridge.", None),
    ],
    "values that are given": [
        (LENGTHS, "Given that AB = 5, we need AC.", None),
        (LENGTHS, "The radius is 5. So the diameter is twice that.", None),
        (LENGTHS, "If it were 10, AB would be longer.", None),
        (lettered("30°", "90°"), "The angle is 90°-x.", None),
        (LENGTHS, "It is 10.", "B"),
        (LENGTHS, "So the length of AC is 15.0.", "C"),
        (LENGTHS, "AC = 10 and AB = 15.", None),
        (LENGTHS, "AC = 7.", None),
        (LENGTHS, "AC = 5 m.", None),
        (LENGTHS, "AC = 20 cm.", "D"),
    ],
    "a value on a line of its own": [
        (LENGTHS, "I look at the picture.\n\n15", "C"),
        (LENGTHS, "Answer: 15", "C"),
        (LENGTHS, "So the answer is:\n15.0", "C"),
        (LENGTHS, "First, 10 + 5.\n15", "C"),
        (LENGTHS, "First, 10.\n3. 15", None),
        (LENGTHS, "Steps:\n1. 10\n2. 15", None),
        (LENGTHS, "10\n15", None),
        (LENGTHS, "The answer is 7.\n15", None),
        (lettered("30°", "60°"), "I look.\n\n60", "B"),
        (lettered("1/2", "3/2"), "Answer: 1 1/2", "B"),
    ],
    "a second choice and a doubt": [
        (COLOURS, "The answer is B or maybe C.", None),
        (COLOURS, "THE ANSWER IS B OR C.", None),
        (COLOURS, "It is unlikely to be B.", None),
        (COLOURS, "It's hard to say whether it is blue.", None),
        (COLOURS, "It is difficult to see, but the answer is B.", "B"),
        (YES_NO, "The answer is B. Wait, no, it is A.", "A"),
        (YES_NO, "The answer is A. Wait, no, it is B.", "B"),
        (lettered("A horse", "The bird"), "The answer is A. Wait, no, it is the bird.", "B"),
        (SMALL, "5 is too many.", None),
        (SMALL, "5 is wrong.", None),
    ],
    "what is said after a take-back": [
        (COLOURS, "The answer is C. Wait, it is a red car.\nB", "B"),
        (COLOURS, "The answer is A. Wait, it is red before mixing. So after mixing, blue.", "B"),
        (COLOURS, "The answer is A. Wait, it is the blue one.", "B"),
        (YES_NO, "The answer is B. Wait, yes, it is A.", "A"),
        (COLOURS, "It's not hard to see that the answer is B.", "B"),
        (COLOURS, "It's hard to tell, but I think B.", "B"),
        (COLOURS, "The car is hard to see. The car is blue.", "B"),
        (COLOURS, "The answer is B: too easy!", "B"),
        (lettered("km/h", "m/s"), "The speed is 5 m/s", "B"),
        (lettered("60°", "90°"), "The angle is 60⁰.", "A"),
    ],
    "what goes on after a number": [
        (lettered("5", "5√2", "10"), "The answer is $5\\sqrt 2$.", "B"),
        (lettered("5", "5√2", "10"), "5*sqrt(2)", "B"),
        (SMALL, "It is 5\\theta", None),
        (SMALL, "It is 5 \\cdot 2", None),
        (SMALL, "5 times the square root of 2", None),
        (SMALL, "5 and a half", None),
        (SMALL, "5 or more", None),
        (SMALL, "It happened 5 times.", "C"),
        (lettered("2π", "π"), "The answer is \\pi.", "B"),
        (lettered("1/2", "1/3"), "½", "A"),
    ],
}
# fmt: on


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind):
    read = [answers.extract_answer(text, options)[0] for options, text, _ in KINDS[kind]]
    assert len(read) == 10 and read == [letter for _, _, letter in KINDS[kind]]


POINTS, THINGS = ["Point A", "Point B"], ["chair", "table"]
ANIMALS = ["cat", "dog", "bird", "fish"]


@pytest.mark.parametrize(
    "text, options, letter",
    [
        # what is compared with is not chosen
        ("Point B is closer to the camera than point A.", POINTS, "B"),
        ("The chair is closer to the camera than the table.", THINGS, "A"),
        ("The table appears closer compared to the chair.", THINGS, "B"),
        ("Comparing the chair and the table, the chair is closer.", THINGS, "A"),
        # nor does a remark on another option take back what was declared
        ("The answer is B. However, C is also plausible.", ANIMALS, "B"),
        ("The answer is B, but C is plausible.", ANIMALS, "B"),
        ("The answer is B. C is also correct.", ANIMALS, "B"),
        ("The correct answer is B. A common mistake is to choose C.", ANIMALS, "B"),
        ("The answer is B; many would select A.", ANIMALS, "B"),
        ("The answer is B.\nIf the animal had wings, the answer would be C.", ANIMALS, "B"),
        ("If so, the answer would be C.", ANIMALS, "C"),
        ("C is plausible.", ANIMALS, "C"),
        ("I would choose B", ANIMALS, "B"),
        # what opens a list of several chooses none
        ("A cat, a dog, and a fish.", ANIMALS, None),
        ("Dog, or maybe fish.", ANIMALS, None),
        ("Left, then right.", ["left", "right"], None),
        ("C, since a dog has no wings", ANIMALS, "C"),
        # but what goes on to something else does
        ("Cat, the dog is behind the fence.", ANIMALS, "A"),
        ("Left, the right side is empty.", ["left", "right"], "A"),
        ("The answer is A at first glance. The correct answer would be B.", ANIMALS, "B"),
        ("Other than the dog, nothing is visible.", ANIMALS, "B"),
        # a word of a number is no number
        ("There are twenty-five.", ["20", "25", "30", "5"], "B"),
        ("thirty one", ["1", "31", "30"], "B"),
        ("one hundred and twelve", ["12", "112"], None),
        ("the twenty-first", ["20", "21"], None),
        ("There are twenty chairs.", ["20", "25"], "A"),
    ],
)
def test_named_beside_another(text, options, letter):
    assert answers.extract_answer(text, options)[0] == letter


@pytest.mark.parametrize(
    "text, letter",
    [
        ("\\boxed{B}", "B"),
        ("<think>A or D?</think>\n\\boxed{B}", "B"),
        ("<answer>B</answer>", "B"),
        ("<answer>The answer is b</answer>", "B"),
        ("Answer: B", "B"),
        ("Answer: (B)", "B"),
        ("**Answer:** B", "B"),
        ("The answer is B", "B"),
        (
            "The correct option is (B), as shown by the long wall on the left, "
            "which A and C, unlike D, do not have here",
            "B",
        ),
        ("b", "B"),
        ("Because AB=3, so C", "C"),
        ("Option A: red. Option B: blue. The car is blue.", "B"),
        # what the rule says of other outputs
        ("<answer>A</answer> no: <answer>(B) blue", "B"),
        ("<answer>\\boxed{\\text{B}}</answer>", "B"),
        ("\\boxed{A} then \\boxed{B", "A"),
        ("<latent></latent> <parser> (A) A </parser> B", "B"),
        ("<abs_vis_token>x</abs_vis_token><observation>A</observation>B", "B"),
        ("<think> C </think> <think> D </think> The option is: **B**.", "B"),
        ("(A) is wrong.\nSo (B)", "B"),
        ("(B) it is\nbecause of the wall", "B"),
        ("B. blue", "B"),
        ("Blue.", "B"),
        ("It is a dark wood", "D"),
        ("The answer is a dog", None),
        ("A dog", None),
        ("A and B\nor C and D", None),
        ("red or blue", None),
        ("blue " * 40, None),
        ("<think> it is B", None),
        ("<think> it is \\boxed{B}", "B"),
        ("", None),
        ("<answer></answer> B", None),
        ("E", None),
    ],
)
def test_letters(text, letter):
    assert answers.extract_answer(text, OPTIONS)[0] == letter
    assert answers.extract_answer(text, list(OPTIONS.values()))[0] == letter


@pytest.mark.parametrize(
    "text, rule",
    [
        ("(b)", "letter"),
        ("Blue.", "option text"),
        ("Compare A with C:\n(B)", "last line"),
        ("The answer is B, not A.", "declared"),
        ("B. blue\nas in row A", "opening"),
        ("A and C are cut, so it is B", "conclusion"),
        ("B is closer than A", "leading"),
        ("I take B", "named"),
        ("The map is all blue", "named"),
        ("<answer>B</answer>", "answer"),
        ("\\boxed{blue}", "boxed, option text"),
        ("\\boxed{4} is its number. The answer is B.", "declared"),
    ],
)
def test_the_rule_is_named(text, rule):
    assert answers.extract_answer(text, OPTIONS) == ("B", rule)


def test_a_truncated_thought_says_so():
    assert answers.extract_answer("<think> it is B", OPTIONS) == (None, "truncated")


@pytest.mark.parametrize(
    "text, kind, value",
    [
        ("The area is 5 cm^2", "number", "5"),
        ("= 1,234.50.", "number", "1234.50"),
        ("<answer>three</answer>", "number", "3"),
        ("There are 4 red and 5 blue ones, so 9 in all.", "number", "9"),
        # a mark within a number ends no clause
        ("The closest point of the table, which is 1.3 meters away", "number", "1.3"),
        ("After counting we find 10.5", "number", "10.5"),
        ("After 2015 the value rises to 1,250", "number", "1250"),
        ("If we add them we get 2,500 people", "number", "2500"),
        ("We get 15/4, which equals 3.75.", "number", "3.75"),
        # a range is no number
        ("Approximately 3 to 4 meters", "number", None),
        ("about 3-4 m", "number", None),
        ("It rises from 3 to 4", "number", "4"),
        ("The ratio is 3 to 4, which is 0.75.", "number", "0.75"),
        ("10-4 is 6", "number", "6"),
        # words
        ("There are twelve chairs.", "number", "12"),
        ("Twenty-five", "number", "25"),
        ("thirty one people", "number", "31"),
        ("the twenty-first", "number", None),
        ("twenty first", "number", None),
        ("twenty with a hat", "number", "20"),
        ("two hundred and twenty", "number", None),
        ("There are one hundred twelve", "number", None),
        # and what stands beside a range may be one
        ("In the 2019-20 season he scored 31 goals.", "number", "31"),
        ("The 18-24 bar shows 40.", "number", "40"),
        ("Over the years 2000 to 2005 it rose by 5.", "number", "5"),
        ("x = 4 or x = 5", "number", None),
        ("4\n\nThere are 2 on the left and 2 on the right.", "number", "4"),
        ("12 cm\n\nExplanation: 3 rows of 4.", "number", "12"),
        ("4 (2 by the table, 2 by the window)", "number", "4"),
        ("There are 4 chairs. In frame 12 they are clearest.", "number", "4"),
        ("It is step 3.", "number", "3"),
        ("1\n2\n3", "number", "3"),
        ("There are 4 tables with 4 chairs each, i.e. 16 chairs in total.", "number", "16"),
        ("There are twenty-five of them.", "number", "25"),
        ("It is a two-door car.", "number", "2"),
        ("one-third", "number", None),
        ("I first thought there were 3. After recounting I get 4.", "number", "4"),
        ("3 red ones and 2 blue ones. If we add 3 and 2 we get 5.", "number", "5"),
        ("The legs are 3 and 4. This gives a hypotenuse which is 5.", "number", "5"),
        ("I count 2 on the left and 3 on the right. The total is (5).", "number", "5"),
        ("There are 12 people. In the picture 5 are women.", "number", "5"),
        ("4 red\nplus 5 blue\nmakes 9", "number", "9"),
        ("3\n\nWait, there is another behind the sofa, so the total is 4.", "number", "4"),
        ("20 square meters\n\nIt is 4 m wide and 5 m long.", "number", "20"),
        ("5\n\nOnly 1 or 2 of them are partly hidden.", "number", "5"),
        ("5\n\nIt is not possible to tell their colour.", "number", "5"),
        ("There are a total of 5 chairs: 2 near the window and 3 at the table.", "number", "5"),
        ("The room has an area of 20 square meters, with 2 windows.", "number", "20"),
        ("two hundred", "number", None),
        ("1.5 million", "number", None),
        ("It is one of the tallest.", "number", None),
        ("1-2", "number", None),
        ("It is -3", "number", "-3"),
        (".5", "number", ".5"),
        ("no number", "number", None),
        # the number that a sentence is about, and not its last one
        ("The cost is $10.4 for 1+3/10 kilograms.", "number", "10.4"),
        ("There are 6 cubes left after removing 3 of the 9.", "number", "6"),
        ("The difference is 12, since 20 - 8 = 12.", "number", "12"),
        ("The total is 2 × 6 = 12 apples.", "number", "12"),
        ("The value was 45 in 2010.", "number", "45"),
        ("In 2010 the value was 45.", "number", "45"),
        ("The number of bars above 20 is 3.", "number", "3"),
        ("The median is 6 out of 11 values", "number", "6"),
        ("If one side is 5, then the perimeter is 20.", "number", "20"),
        ("The height is 5 m and the width is 3 m, giving 15 square meters.", "number", "15"),
        ("The answer is 8. There were 3 red ones and 5 blue ones.", "number", "8"),
        # a refusal, and two numbers
        ("Two people are seen, but the age gap can not be told.", "number", None),
        ("I cannot determine the age difference between the two people.", "number", None),
        ("It is not possible to tell from one image.", "number", None),
        ("I can't tell exactly, but it is about 5.", "number", "5"),
        ("It is either 12 or 13.", "number", None),
        # other forms
        ("\\boxed{60^\\circ}", "number", "60"),
        ("\\boxed{\\$1{,}200}", "number", "1200"),
        ("\\boxed{x = 11}", "number", "11"),
        ("\\boxed{\\frac{1}{4}}", "number", "0.25"),
        ("x = −5 °C", "number", "-5"),
        ("答案是１２个。", "number", "12"),
        ("so [1, 2.5]", "list", "[1, 2.5]"),
        ("No, there is not", "yesno", "no"),
        ("Yes.", "yesno", "yes"),
        ("yes and no", "yesno", None),
        ("Yes, there is no doubt of it.", "yesno", "yes"),
        ("答案是Yes", "yesno", "yes"),
        # parts that are named after the count, and abbreviations
        ("7 people in the image, 3 of whom are standing", "number", "7"),
        ("There are 5 cars in the picture. 2 of them are red.", "number", "2"),
        ("It is about 20 years (1940 vs. 1960).", "number", "20"),
        ("4 tables with 4 chairs each, i.e. 16 chairs in total.", "number", "16"),
        ("图中有7个人,其中3个站着。", "number", "7"),
        ("∠C = 89° = 180° - 91°", "number", "89"),
        ("She is 41 years older than the one on the right, who is 11.", "number", "41"),
        ("2½", "number", "2.5"),
        ("12 or more", "number", None),
        ("x = 5 \\end{aligned}", "number", "5"),
        ("There are 2 groups, and the total of people who came is 8.", "number", "8"),
        ("There are 5 dogs, one of which is hard to see.", "number", "5"),
        ("5!=120", "number", "120"),
        ("I can see 5. It's hard to say whether there are more.", "number", "5"),
    ],
)
def test_values(text, kind, value):
    assert answers.extract_answer(text, None, kind)[0] == value


@pytest.mark.parametrize(
    "text, options, kind, answer",
    [
        ("Looking closely, A seems", COLOURS, "text", None),
        ("so it could be A. Next, I will check the other", COLOURS, "text", None),
        ("The answer is B. To check this", COLOURS, "text", "B"),
        ("<answer> B", COLOURS, "text", "B"),
        (r"It is \boxed{B}, as the other", COLOURS, "text", "B"),
        ("There are 4 chairs. Let me count", None, "number", None),
        ("The answer is 8. Let me count: 3", None, "number", "8"),
        ("There is no", None, "yesno", None),
        ("Yes, there is", None, "yesno", "yes"),
        ("The answer is yes. There", None, "yesno", "yes"),
        ("The final answer is [1, 2].\n\nSo", None, "list", "[1, 2]"),
        ("5\n\nThere are five", None, "number", "5"),
        ("B\n\nExplanation: in the", COLOURS, "text", "B"),
        ("It is a red", None, "text", None),
        ("I first think of [1, 2], but", None, "list", None),
        (r"We get \boxed{x}. It could be A or", COLOURS, "text", None),
        ("", None, "text", None),
    ],
)
def test_what_was_cut_off_says_only_what_it_declared(text, options, kind, answer):
    assert answers.extract_answer(text, options, kind, finished=False)[0] == answer


# --- what is credited is in the answer


# fmt: off
PIECES = [
    "<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "}", "A", "(B)", "b",
    "answer is ", " ", "\n", "blue", "dark wood", "12", "-.5", "<parser>", "</parser>",
    "Option: ", "**", "³", "é", "not ", "so ", "because ", "C. ", "，", "答案是", "Ｄ", ". ", "1/2",
]
# fmt: on
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=12).map("".join)
# without tags and boxes, in which what follows does not count
PLAIN = st.lists(st.sampled_from([p for p in PIECES if "<" not in p and "\\" not in p]))
PLAIN = PLAIN.map("".join)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_extraction_under_fuzz(text):
    """Nothing crashes it, and no answer is credited that the text does not hold."""
    letter, _ = answers.extract_answer(text, OPTIONS)
    seen = values.plain(text).lower()
    if letter is not None:
        assert letter.lower() in seen or values.normalise(OPTIONS[letter]) in seen
    for kind in ("text", "list", "yesno"):
        value, _ = answers.extract_answer(text, None, kind)
        if value is not None:
            assert all(word in text.lower() for word in value.lower().split()) or "\\" in text
    value, method = answers.extract_answer(text, None, "number")
    if value is not None:
        check_number(text, value, method)
    values.math_equal(text, "1")
    for gold in ("B", "12", "yes", "blue"):
        for options in (None, list(OPTIONS.values())):
            answers.is_correct(text, {"answer": gold, "options": options})


def check_number(text, value, method):
    """A number that was read is one, is in the text, and passes the checks that take numbers."""
    float(value)
    seen = values.plain(text).lower().replace(",", "")
    words = [word for word, n in stated.COUNT_WORDS.items() if n == value]
    is_expression = set("/*^√π") & set(seen)  # which stands for its value
    assert value in seen or any(word in seen for word in words) or is_expression
    row = {"answer": "7", "raw": text, "extracted": value, "method": method}
    row |= {"question_type": "free_form", "options": None}
    for answer_type in ("integer", "float"):
        assert scores.check_mathvista(row | {"answer_type": answer_type}) in (True, False)
    assert 0 <= scores.check_vsi(row) <= 1


@settings(max_examples=200, deadline=None)
@given(PLAIN, st.sampled_from("ABCD"))
def test_the_last_declaration_decides(text, letter):
    """Whatever a text says first; and what it denies last is not chosen."""
    said = f"{text}.\nThe answer is ({letter})."
    assert answers.extract_answer(said, OPTIONS)[0] == letter
    said = f"{text}.\nThe answer is not ({letter})."
    # a text in words is another matter: "blue. The answer is not (B)."
    if values.normalise(OPTIONS[letter]) not in text:
        assert answers.extract_answer(said, OPTIONS)[0] != letter


@settings(max_examples=100, deadline=None)
@given(PLAIN)
def test_two_declared_options_choose_none(text):
    for said in ("A or B", "both (B) and (C)", "A, D"):
        assert answers.extract_answer(f"{text}.\nThe answer is {said}.", OPTIONS)[0] is None


# --- golds of every benchmark


def dressed(row):
    """What models write who mean the gold of a benchmark's row."""
    gold, options = row["answer"].strip(), row["options"]
    if options:
        named = [letter for letter, option in options.items() if option == gold]
        letter = named[0] if named else letter_of(gold)
        text = options[letter] or letter
        yield from (f"{letter}. {text}", f"({letter}) {text}", f"({letter})", f"答案是{letter}。")
        yield from (f"<answer>{text}</answer>", f"The answer is {letter}. {text}")
        gold = letter
    yield from (gold, f"**{gold}**", f"\\boxed{{{gold}}}", f"<answer>{gold}</answer>")
    yield from (f"The answer is {gold}", f"The answer is: {gold}.", f"Because 2 > 1.\n答案：{gold}")


def test_golds_are_read_back(bench_root):
    """Every gold of every official layout, in every dress."""
    root, _ = bench_root
    for name, benchmark in benchmarks.BENCHMARKS.items():
        if benchmark.check is scores.check_nothing:  # a judge's
            continue
        for row in benchmarks.load_benchmark(name, root)[0]:
            for raw in dressed(row):
                answer, method = answers.extract_answer(raw, row["options"], row["kind"])
                said = {"raw": raw, "extracted": answer, "method": method}
                assert benchmark.check(row | said), (name, raw, answer, method)


# --- time

# fmt: off
REPEATED = [
    "*", "\\boxed{", "<parser>", "<answer>", "<", "`", "answer: ", "answer is ", "the answer ",
    "A ", "A. ", "A, ", "(A) ", "A\n", "A. x\nB. y\n", "not ", "not A ", "A is ", "a", " ", "\n",
    "\n |", ": ", "is the ", "is 3 ", "1,", "3 or ", "\\text{", "{", "(", "option: ", "red ",
    "red, ", "dark ", "because ", "in the ", "in row A ", "I can not tell ", "so ", "选", "答案是",
    "²", "1. ", "5 c", "_", "?", "A? ", "wait, ", "if ", "x + ", "x = ", "\nNote", "\nNote: ",
    "one ", "twenty ", "3 or 5, ", "centi", "is ", "\\frac{",
]
# fmt: on


def seconds(text):
    """The time of this process for all readings of a text, at best."""
    times = []
    for _ in range(2):
        start = time.process_time()
        for options in (OPTIONS, NUMBERS):
            answers.extract_answer(text, options)
        for kind in ("text", "number", "list", "yesno"):
            answers.extract_answer(text, None, kind)
        answers.is_correct(text, {"answer": "5"})
        times.append(time.process_time() - start)
    return min(times)


def test_time_is_linear():
    """Four times the text takes about four times as long, and not sixteen times."""
    seconds("")
    for piece in REPEATED:
        short, long = (seconds("answer: " + piece * (n // len(piece))) for n in (3000, 12000))
        assert long < 9 * short + 0.02, piece


# --- is it right?


@pytest.mark.parametrize(
    "text,answer",
    [
        ("<think> a </think> <answer> red circle, blue ring </answer>", "red circle, blue ring"),
        ("<think> a <answer>no</answer> </think>\n<answer>B", "B"),
        (r"<think>A or D?</think> so \boxed{\text{B}}", "B"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("<think> never closed", None),
        ("Well.\nThe answer is 12 cm.", "12 cm."),
        ("答案：12", "12"),
        ("So we get\n```\n12\n```", "12"),
        ("<latent></latent> <parser> the answer is C </parser> <answer>D</answer>", "D"),
        ("", None),
    ],
)
def test_extraction(text, answer):
    assert answers.extract_answer(text)[0] == answer


@pytest.mark.parametrize(
    "answer,gold,options,right",
    [
        ("Red  Circle, blue ring.", "red circle, blue ring", [], True),
        (r"\dfrac{1}{2}", r"\frac{1}{2}", [], True),
        ("caf\u00e9", "cafe\u0301", [], True),
        ("the caf\u00e9", "B", ["bar", "cafe\u0301"], True),
        ("red", "\ufeffred\u200b", [], True),
        ("0.5", r"\frac{1}{2}", [], True),
        ("1/3", r"\frac{1}{2}", [], False),
        ("2√3", r"2\sqrt{3}", [], True),
        ("(3, 4)", "(3,4)", [], True),
        ("(4, 3)", "(3,4)", [], False),
        ("12", r"12\,\text{cm}", [], True),
        ("π", r"\pi", [], True),
        (r"\left(2, 3\right)", "(2,3)", [], True),
        ("Therefore, AB = 5 cm.", "5 cm", [], True),
        ("0.5", "the 1/2", [], True),
        ("0.5", "[1/2]", [], True),
        ("two hundred meters", "2", [], False),
        ("1.5 million", "1.5", [], False),
        ("red circle", "red circle, blue ring", [], False),
        ("<", ">", [], False),
        (">", ">", [], True),
        ("1000001", "1000000", [], False),
        ("1,000", "1000.0", [], True),
        ("0.5", ".50", [], True),
        ("12", "13", [], False),
        ("-3", "3", [], False),
        ("(b)", "B", ["4", "5"], True),
        ("B. 5", "B", ["4", "5"], True),
        ("5", "B", ["4", "5"], True),
        ("A", "B", ["4", "5"], False),
        ("E", "B", ["4", "5"], False),
        ("B", "7cm", ["5 cm", "7 cm"], True),
        ("B", r"\frac{1}{2}", ["1/3", "1/2"], True),
        ("A", "7cm", ["5 cm", "7 cm"], False),
        (None, "x", [], False),
        ("", "B", ["4", "5"], False),
        # an answer in other words, signs and forms
        ("The answer is (B).", "B", ["4", "5"], True),
        ("It is blue.", "blue", ["red", "blue"], True),
        ("red or blue", "blue", ["red", "blue"], False),
        ("Ｂ", "B", ["4", "5"], True),
        (r"10 \, \text{cm}", "B", ["5 cm", "10 cm"], True),
        ("There are 12 boards.", "12", None, True),
        ("12 or 13", "13", None, False),
        ("twelve", "12", None, True),
        ("seven", "7", None, True),
        ("12 cm", "12", None, True),
        ("12 cm", "12 m", None, False),
        (r"\frac{1}{2}", "0.5", None, True),
        ("−5", "-5", None, True),
        ("Yes, there is one.", "yes", None, True),
        ("Yes, there is one.", "no", None, False),
        # a letter whose options stand in the question
        *(
            (text, gold, None, True)
            for gold in ("B", "(B)", "B. 60°")
            for text in (
                "B",
                "B. 60°",
                "(B) 60°",
                "B: 60°",
                "Option B",
                "The correct option is B.",
                "B because the sides are equal",
                r"B. 60^\circ",
            )
        ),
        ("60°", "B. 60°", None, True),
        ("C. 60", "B", None, False),
        ("A or B", "B", None, False),
        ("not B", "B", None, False),
        ("A dog", "A", None, False),
        ("45°", "B. 60°", None, False),
        ("Bob", "B", None, False),
        ("B. It is 60°, as the triangle is equilateral", "B. 60°", None, True),
        ("B. The blue one", "B. blue", None, True),
        (r"The probability that it is not red is \frac{3}{4}.", r"\frac{3}{4}", None, True),
        ("It isn't 1/3; it is 1/2", r"\frac{1}{2}", None, True),
        ("A. Jones", "A. Smith", None, False),
        ("C. briggsae", "C. elegans", None, False),
        ("A", "(A) and (B)", None, False),
        ("A: 10", "A: 12, B: 13", None, False),
        ("A. 6", "A. 5", None, False),
        # the value that a sentence ends with
        (r"Therefore, the probability is \frac{3}{4}.", r"\frac{3}{4}", None, True),
        (r"So the length is $5\sqrt{2}$.", r"5\sqrt{2}", None, True),
        (r"Hence the area is $8\pi$ square units.", r"8\pi", None, True),
        (r"So the length is $5\sqrt{2}$.", "5", None, False),
        ("It is impossible to tell whether the number is 5.", "5", None, False),
        (r"I do not think the area is 8\pi", r"8\pi", None, False),
        ("12, because the number of sides is 5", "5", None, False),
    ],
)
def test_check(answer, gold, options, right):
    assert answers.is_correct(answer, {"answer": gold, "options": options}) == right


# fmt: off
OUTPUTS = {  # by kind: (output, gold answer, options, is it right?)
    "a number that is not stated": [
        *((f"<answer>{said}</answer>", "12", None, False) for said in (
            "It is not 12.", "more than 12", "at least 12", "x > 12", "x \\geq 12", "\\pm 12",
            "negative 12", "12x", "12 + x", "x - 12", "\\frac{a+b}{12}", "\\log 12", "12\\sqrt{3}",
            "5 × 12", "12 x 10^6", "15 or 12", "9°, 12°", "(9, 12)", "9-12", "from 9 to 12",
            "9 rows and 12 tables", "15 rather than 12", "x = 9, x = 12", "12k",
        )),
        ("<answer>two thirds</answer>", "2", None, False),
        ("<answer>fifty five</answer>", "5", None, False),
        ("<answer>the left one</answer>", "1", None, False),
        ("The answer is 15, not 12.", "15", None, True),
        ("<answer>There are 12 of them.</answer>", "12", None, True),
        ("<answer>4 + 8 = 12</answer>", "12", None, True),
        ("<answer>$12.00</answer>", "12", None, True),
        ("<answer>4 red and 8 blue, so 12 in total</answer>", "12", None, True),
        ("<answer>There is one dog.</answer>", "1", None, True),
    ],
    "equations": [
        ("<answer>AC = CD</answer>", "AB=CD", None, False),
        ("<answer>AB = CD</answer>", "AB=CD", None, True),
        ("<answer>EF = CD</answer>", "A", ["AB = CD", "BC = AD"], False),
        ("<answer>x+y=1</answer>", "x^2+y^2=1", None, False),
        ("<answer>y = 5</answer>", "2x + y = 5", None, False),
        ("<answer>2x + 1</answer>", "y = 2x + 1", None, True),
        ("<answer>3 × 4 = 12 cm</answer>", "12 cm", None, True),
    ],
    "scores, dates and ranges are no sums": [
        ("<answer>5</answer>", "10-5", None, False),
        ("<answer>2/1/2010</answer>", "12/6/2010", None, False),
        ("<answer>3/5/2010</answer>", "03/05/2010", None, True),
    ],
    "markup around what is declared": [
        ("**Answer**: Red", "red", None, True),
        ("**Final Answer:**\n\n$$12$$", "12", None, True),
        ("So the answer is:\n\\[\n12\n\\]", "12", None, True),
    ],
    "a sentence that says the answer": [
        ("<answer>The answer is Nike.</answer>", "Nike", None, True),
        ("<answer>Answer: red</answer>", "red", None, True),
        ("<answer>It's red.</answer>", "red", None, True),
        ("The color of the car is **red**.", "red", None, True),
        ("<answer>It is not red.</answer>", "red", None, False),
        ("<answer>I doubt that it is red.</answer>", "red", None, False),
        ("The car is green and the bus is red.", "red", None, False),
    ],
    "what follows the answer": [
        ("Thus, the total is 12.\n\nI hope this helps!", "12", None, True),
        ("Red.\n\nExplanation: it is painted so.", "red", None, True),
        ("The total is 12 chairs.\n\nNote: each row has 4.", "4", None, False),
        ("I think it's option B.\n\nLet me know if you need more.", "B", list("wxyz"), True),
    ],
    "a box, and what is declared after it": [
        ("\\boxed{12} is the width. The answer is 24.", "12", None, False),
        ("\\boxed{12} is the width. The answer is 24.", "24", None, True),
    ],
    "taken back, or only supposed": [
        ("The answer is A. Wait, the car is blue. So it's B.", "B", ["red", "blue"], True),
        ("The answer is A. No, that's wrong: it's B.", "B", ["red", "blue"], True),
        ("If the answer is A, the car should be red. It is blue.", "A", ["red", "blue"], False),
        ("Answer: B. Wait times are longer there.", "B", ["red", "blue"], True),
    ],
    "yes, no, and neither": [
        ("I have no idea.", "no", None, False),
        ("I have no doubt that there is a dog.", "no", None, False),
        ("The answer is: Yes. There is no doubt.", "yes", None, True),
        ("There is no way to tell from this image.", "B", ["Yes", "No"], False),
        ("I have no doubt that he wears a hat.", "B", ["Yes", "No"], False),
        ("There is no dog.", "B", ["Yes", "No"], True),
    ],
    "denied in other words": [
        *((said, "A", ["red", "blue"], False) for said in (
            "A is not true.", "A is not supported by the image.", "A does not seem to be correct.",
            "A is the wrong answer.", "A is not a good match.", "A would be wrong.", "不能选A",
            "A不是正确答案", "Everything but A is correct.", "I doubt that it is A.",
        )),
        ("There is no doubt that it is A.", "A", ["red", "blue"], True),
    ],
    "an option in a bound or an expression": [
        *((f"\\boxed{{{said}}}", "B", ["5", "10", "12", "13"], False) for said in (
            "x+10", "\\pm 10", "\\log 10", "x \\geq 10", "10+x",
        )),
        ("There are more than 4 dogs.", "B", ["3", "4", "5"], False),
        ("The area is 10 cm^2.", "B", ["5 cm", "10 cm"], False),
        ("\\boxed{2x+1}", "C", ["$x+1$", "$x-1$", "$2x$"], False),
    ],
    "a letter beside a number that is no option": [
        ("The angle is 60 degrees, which is that of option C.", "C", ["30°", "45°", "60°"], True),
        ("The total is 12!", "12", None, True),
        ("It is about 10.2 cm, closest to option B.", "B", ["5 cm", "10 cm"], True),
    ],
    "what is no denial, retraction or remark": [
        ("The answer is B. B does not have a line of symmetry.", "B", list("ABCD"), True),
        ("**Answer:** B\n\n- A is symmetric\n- B is not symmetric", "B", list("ABCD"), True),
        ("答案是B。B不是轴对称图形。", "B", list("ABCD"), True),
        ("Only B is not blurred.", "B", list("ABCD"), True),
        ("The object is a discarded bottle.", "B", ["can", "bottle"], True),
        ("The right picture lacks the shoe.", "B", ["hat", "shoe"], True),
        ("The answer is B. Actually, the red car is behind it.", "B", ["red", "blue"], True),
        ("The answer is B. Hmm, A is also close, but B is better.", "B", ["red", "blue"], True),
        ("If you look closely the answer is B", "B", ["red", "blue"], True),
        ("Well.\n\n**Reasoning:** It is blue.\n\n**Answer:** B", "B", list("xyz"), True),
        ("Look.\nThe answer is B. I hope this helps!", "B", ["red", "blue"], True),
        ('The text reads:\n"Feel free to touch"', "feel free to touch", None, True),
        ("There is no way to fold A to get this, so the answer is B.", "B", list("wxyz"), True),
        ("\\boxed{12}. The answer is rounded to 2 digits.", "12", None, True),
        ("The answer is 12 - I counted twice.", "B", ["10", "12", "15"], True),
    ],
    "a number that is stated": [
        *((f"<answer>{said}</answer>", "12", None, True) for said in (
            "They add up to 12.", "10 + 2 is equal to 12", "11.8 rounds to 12", "2x = 24, x = 12",
            "5 red, 7 blue, 12 total", "5 cats, 7 dogs: 12 animals in total", "In 2015: 12%",
            "In 2015, 12 people voted.", "4 cm × 3 cm = 12 cm²", "x + y = 12", "24 - 12",
        )),
        ("There are 4 quarter notes.", "4", None, True),
    ],
    "an option's letter and its text, which is another's letter": [
        *((said, "D", ["B", "C", "D", "E"], True) for said in (
            "D. E", "(D) E", "**D. E**", "<answer> D. E </answer>", "\\boxed{D. E}", "D",
        )),
        ("D. B", "D", ["B", "C", "D", "E"], False),
    ],
    "units and signs in words": [
        ("<answer>24 centimeters</answer>", "24 cm", None, True),
        ("<answer>24 square centimeters</answer>", "24 cm^2", None, True),
        ("<answer>24 centimeters</answer>", "24 cm^2", None, False),
        ("<answer>x \\geq 2</answer>", "x ≥ 2", None, True),
        ("<answer>5</answer>", "€5", None, True),
    ],
    "what follows a number and is no unit": [
        *((said, "5", None, False) for said in (
            "5 is wrong", "5e3", "5 or more", "5 squared", "5 plus two", "5 halves",
            "\\boxed{5 \\text{ squared}}", "5\\alpha", "5½",
        )),
        *((said, "5", None, True) for said in (
            "5 times", "5 years old", "5 red balls", "5 cubic centimeters", "5 km per hour", "5 μm",
            "5 Ω", "It is not hard to see that there are 5 dogs.",
        )),
    ],
    "signs of several spellings": [
        ("x >= 2", "x ≥ 2", None, True),
        ("x != 2", "2", None, False),
        ("(-∞, 2]", "(-\\infty, 2]", None, True),
        ("‑5", "-5", None, True),
        ("-$5", "$5", None, False),
        ("\\boxed{1\\frac{3}{4}}", "\\frac{3}{4}", None, False),
    ],
    "what a sign says": [
        ("The sign says \"STOP\".", "stop", None, True),
        ("The clock shows 3:15.", "3:15", None, True),
        ("THE CAR IS RED", "red", None, True),
        ("The text says the store is closed.", "closed", None, True),
        ("3/4 is correct.", "3/4", None, True),
        ("Paris is the correct answer.", "Paris", None, True),
        ("Rome is the correct answer.", "Paris", None, False),
    ],
}
# fmt: on


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs(kind):
    """From a whole output to right or wrong."""
    for raw, gold, options, right in OUTPUTS[kind]:
        answer, _ = answers.extract_answer(raw, options)
        assert answers.is_correct(answer, {"answer": gold, "options": options}) == right, raw


def test_readings_of_a_file(tmp_path):
    """What `python answers.py FILE.jsonl` prints."""
    rows = [
        {"raw": "The answer is (B).", "options": ["red", "blue"], "gold": "B"},
        {"raw": "It is blue.", "options": {"A": "red", "B": "blue"}, "gold": "A"},
        {"raw": "I can not tell.", "options": ["red", "blue"], "gold": "A"},
        {"raw": "There are 12 of them in 2 rows.", "gold": 12, "kind": "number"},
    ]
    file = tmp_path / "outputs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    lines = [line.split() for line in run("answers.py", file).splitlines()]
    assert [line[0] for line in lines[:4]] == ["=", "!", "-", "="]
    assert lines[-1] == ["2", "of", "4", "all"]
    file.write_text('{"raw": "It is 12.", "options": [10, 12], "gold": 12}')
    assert run("answers.py", file).startswith("=  'B'")
    for row, said in (
        ({"raw": "B"}, "row 0 needs"),
        ({"raw": None, "gold": "B"}, "raw must be a text"),
        ({"raw": "B", "gold": "B", "kind": "integer"}, "kind text, number, list or yesno"),
    ):
        file.write_text(json.dumps(row))
        assert said in run("answers.py", file, ok=False)
