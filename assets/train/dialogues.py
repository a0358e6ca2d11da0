"""Questions with reasoning and answers: six small subjects, many ways of asking.

A question is built from a core ("What is {a} + {b}?"), an opening, a closing and a spelling
variant. Some cores, openings, sentences and colour pairs are kept for the exam: the training
generator cannot produce them, and `train.py` asserts that it did not.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from pictures import Picture
from qwen35.verification.asking_transformers import COLORS

ONE_WORD = ("Answer in one word.", "Answer with one word.")
OPENINGS = (
    "",
    "",
    "",
    "",
    "Please tell me: ",
    "Hello! ",
    "Hi, ",
    "Hey, ",
    "Question: ",
    "Quick question: ",
    "I have a question. ",
    "Can you help me? ",
    "Here is a task. ",
    "Good morning! ",
    "Please answer this. ",
    "One more thing. ",
    "Next. ",
    "OK, ",
    "Well, ",
    "Q: ",
    "I am curious. ",
    "Excuse me, ",
)
SHORT_CLOSINGS = (
    "",
    "",
    "",
    " Answer in one word.",
    " Answer in one word.",
    " Answer with one word.",
    " Just the answer, please.",
    " Reply with a single word.",
    " Use one word.",
    " One word only.",
    " Be brief.",
    " Thanks!",
    " Thank you.",
    " Please.",
    " Give only the answer.",
    " Keep it short.",
    " Respond with one word.",
)
LONG_CLOSINGS = ("", "", "", "", " Thanks!", " Please.", " Thank you.", " Be brief.")
SYSTEMS = (
    "You are a helpful assistant.",
    "You are a careful assistant. Answer briefly.",
    "Answer the question.",
)


@dataclass(frozen=True)
class Example:
    """One exchange: what the user asks, what may be thought, what is answered."""

    subject: str
    prompt: str
    thought: str
    answer: str
    picture: Picture | None = None
    system: str | None = None


def _vary(rng: random.Random, text: str) -> str:
    """Small spelling changes a person makes: case, missing or doubled end mark, spaces."""
    draw = rng.random()
    if draw < 0.10:
        text = text.lower() if "'" not in text and '"' not in text else text
    elif draw < 0.16:
        text = text[:-1] if text[-1] in "?." else text
    elif draw < 0.19:
        text = text + "!" if text[-1] not in "?.!" else text[:-1] + "!"
    elif draw < 0.22:
        text = text[:-1] + " ?" if text[-1] == "?" else text
    return text


def ask_with(rng: random.Random, core: str, closings: tuple[str, ...]) -> str:
    """Wrap a core question in an opening, a closing and a spelling variant."""
    opening = rng.choice(OPENINGS) if rng.random() < 0.6 else ""
    closing = rng.choice(closings)
    if opening.endswith(", ") and core.split(" ")[0] not in {"I", "I'd"}:
        core = core[0].lower() + core[1:]
    if closing and core[-1] not in ".?!:'\"":
        core += "."
    return _vary(rng, opening + core + closing)


# Arithmetic ---------------------------------------------------------------------------------

SUM_CORES = (
    "What is {a} + {b}?",
    "What is {a} + {b}?",
    "What's {a} + {b}?",
    "What is {a} plus {b}?",
    "What's {a} plus {b}?",
    "How much is {a} + {b}?",
    "How much is {a} plus {b}?",
    "Calculate {a} + {b}.",
    "Compute {a} + {b}.",
    "Compute {a} plus {b}.",
    "{a} + {b} = ?",
    "{a}+{b}=",
    "{a} + {b}",
    "What do you get when you add {a} and {b}?",
    "What do you get if you add {b} to {a}?",
    "Add {a} and {b}.",
    "What is the sum of {a} and {b}?",
    "Give me the sum of {a} and {b}.",
    "Tell me what {a} + {b} is.",
    "Tell me {a} plus {b}.",
    "Solve {a} + {b}.",
    "Find the sum of {a} and {b}.",
    "Do you know what {a} + {b} is?",
    "I need to know {a} + {b}.",
    "Can you add {a} and {b}?",
    "{a} plus {b} is what?",
    "What does {a} + {b} make?",
    "What is the result of adding {a} and {b}?",
    "I want the result of {a} + {b}.",
    "Could you calculate {a} + {b} for me?",
    "What number is {a} + {b}?",
)
DIFFERENCE_CORES = (
    "What is {a} - {b}?",
    "What is {a} - {b}?",
    "What's {a} - {b}?",
    "What is {a} minus {b}?",
    "How much is {a} - {b}?",
    "How much is {a} minus {b}?",
    "Calculate {a} - {b}.",
    "Compute {a} minus {b}.",
    "{a} - {b} = ?",
    "{a}-{b}=",
    "Subtract {b} from {a}.",
    "What do you get when you subtract {b} from {a}?",
    "What is the difference between {a} and {b}?",
    "Tell me what {a} - {b} is.",
    "Solve {a} - {b}.",
    "Do you know what {a} - {b} is?",
    "{a} minus {b} is what?",
    "I want the result of {a} - {b}.",
    "Could you calculate {a} - {b} for me?",
    "What number is {a} - {b}?",
)
PRODUCT_CORES = (
    "What is {a} * {b}?",
    "What is {a} x {b}?",
    "What's {a} * {b}?",
    "What is {a} times {b}?",
    "How much is {a} * {b}?",
    "How much is {a} times {b}?",
    "Calculate {a} * {b}.",
    "Compute {a} times {b}.",
    "{a} * {b} = ?",
    "{a}*{b}=",
    "Multiply {a} by {b}.",
    "What is the product of {a} and {b}?",
    "What do you get when you multiply {a} by {b}?",
    "Tell me what {a} * {b} is.",
    "Solve {a} * {b}.",
    "{a} times {b} is what?",
    "Could you calculate {a} * {b} for me?",
    "What number is {a} * {b}?",
)


def arithmetic(rng: random.Random) -> Example:
    """A one-digit sum, difference or small product."""
    kind = rng.choice("+++--*")
    a, b = rng.randrange(10), rng.randrange(10)
    cores: tuple[str, ...]
    if kind == "+":
        cores, word, result = SUM_CORES, "plus", a + b
    elif kind == "-":
        a, b = max(a, b), min(a, b)
        cores, word, result = DIFFERENCE_CORES, "minus", a - b
    else:
        a, b = rng.randrange(1, 6), rng.randrange(1, 6)
        cores, word, result = PRODUCT_CORES, "times", a * b
    prompt = ask_with(rng, rng.choice(cores).format(a=a, b=b), SHORT_CLOSINGS)
    thought = f"The user asks for {a} {word} {b}. {a} {kind} {b} = {result}."
    return Example("arithmetic", prompt, thought, str(result))


LEFTOVER_CORES = (
    "What is left when you take {b} from {a}?",
    "How much is left when {b} is taken from {a}?",
    "How many are left of {a} if {b} are gone?",
    "I have {a} and give away {b}. What is left?",
    "I had {a} apples and ate {b}. How many are left?",
    "There were {a} birds and {b} flew away. How many are left?",
    "Take {b} away from {a}. What is left?",
    "{a} take away {b} leaves what?",
    "What remains of {a} after {b} is taken away?",
    "Is it right that {a} - {b} is {c}? Give me the result.",
    "Tell me the right result of {a} - {b}.",
    "Which number is left if {b} is removed from {a}?",
)


def leftover(rng: random.Random) -> Example:
    """A difference, asked for with the words that else belong to pictures."""
    a, b = sorted((rng.randrange(10), rng.randrange(10)), reverse=True)
    core = rng.choice(LEFTOVER_CORES).format(a=a, b=b, c=a - b)
    thought = f"The user asks for {a} minus {b}. {a} - {b} = {a - b}."
    return Example("arithmetic", ask_with(rng, core, SHORT_CLOSINGS), thought, str(a - b))


# Capitals -----------------------------------------------------------------------------------

CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "Austria": "Vienna",
    "Greece": "Athens",
    "Poland": "Warsaw",
    "Sweden": "Stockholm",
    "Norway": "Oslo",
    "Finland": "Helsinki",
    "Denmark": "Copenhagen",
    "Ireland": "Dublin",
    "Hungary": "Budapest",
    "Japan": "Tokyo",
    "China": "Beijing",
    "India": "Delhi",
    "Russia": "Moscow",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Canada": "Ottawa",
    "Cuba": "Havana",
    "Peru": "Lima",
    "Chile": "Santiago",
    "Belgium": "Brussels",
}
CAPITAL_CORES = (
    "What is the capital of {x}?",
    "What is the capital of {x}?",
    "What is the capital of {x}?",
    "What's the capital of {x}?",
    "What is the capital city of {x}?",
    "What is {x}'s capital?",
    "Which city is the capital of {x}?",
    "Name the capital of {x}.",
    "Name the capital city of {x}.",
    "Tell me the capital of {x}.",
    "Tell me what the capital of {x} is.",
    "Do you know the capital of {x}?",
    "Can you name the capital of {x}?",
    "Capital of {x}?",
    "The capital of {x} is",
    "The capital of {x} is what city?",
    "{x}: what is its capital?",
    "Give me the capital of {x}.",
    "I need the capital of {x}.",
    "I forgot the capital of {x}. What is it?",
    "In {x}, which city is the capital?",
    "What city is the capital of {x}?",
    "What is the name of the capital of {x}?",
    "Where is the government of {x}?",
)


LATE_CAPITAL_CORES = (
    "Could you name the capital of {x}?",
    "Can you tell me the capital of {x}?",
    "Would you tell me what the capital of {x} is?",
    "My teacher wants to know the capital of {x}.",
    "Somebody asks me for the capital of {x}. What do I say?",
    "A child asks what the capital of {x} is.",
    "How is the capital of {x} called?",
    "What do you call the capital of {x}?",
    "What name has the capital of {x}?",
    "Please say what the capital of {x} is.",
    "Please tell me which city is the capital of {x}.",
    "Which city do people in {x} call their capital?",
    "We look for the capital of {x}. Which city is it?",
    "I wonder what the capital of {x} is.",
    "Remind me of the capital of {x}.",
    "Is there a capital in {x}? What is its name?",
)


def capital(rng: random.Random, cores: tuple[str, ...] = CAPITAL_CORES) -> Example:
    """The capital of one of twenty-five countries."""
    country = rng.choice(list(CAPITALS))
    city = CAPITALS[country]
    prompt = ask_with(rng, rng.choice(cores).format(x=country), SHORT_CLOSINGS)
    thought = f"The user asks for the capital of {country}. The capital of {country} is {city}."
    return Example("capital", prompt, thought, city)


def late_capital(rng: random.Random) -> Example:
    """The same, asked for in ways the first stages do not know."""
    return capital(rng, LATE_CAPITAL_CORES)


# Translation --------------------------------------------------------------------------------

NOUNS = {
    "sky": ("le ciel", "m"),
    "cat": ("le chat", "m"),
    "dog": ("le chien", "m"),
    "book": ("le livre", "m"),
    "garden": ("le jardin", "m"),
    "bread": ("le pain", "m"),
    "tree": ("l'arbre", "m"),
    "hat": ("le chapeau", "m"),
    "house": ("la maison", "f"),
    "car": ("la voiture", "f"),
    "sea": ("la mer", "f"),
    "moon": ("la lune", "f"),
    "table": ("la table", "f"),
    "flower": ("la fleur", "f"),
    "door": ("la porte", "f"),
    "river": ("la rivière", "f"),
}
ADJECTIVES = {
    "blue": ("bleu", "bleue"),
    "green": ("vert", "verte"),
    "red": ("rouge", "rouge"),
    "black": ("noir", "noire"),
    "white": ("blanc", "blanche"),
    "yellow": ("jaune", "jaune"),
    "big": ("grand", "grande"),
    "small": ("petit", "petite"),
    "beautiful": ("beau", "belle"),
    "old": ("vieux", "vieille"),
    "cold": ("froid", "froide"),
    "new": ("neuf", "neuve"),
}
UNSEEN_SENTENCES = frozenset(
    {
        ("sea", "blue"),
        ("car", "black"),
        ("cat", "white"),
        ("house", "old"),
        ("tree", "green"),
        ("door", "red"),
        ("garden", "beautiful"),
        ("moon", "yellow"),
        ("book", "small"),
        ("river", "cold"),
    }
)
TRANSLATE_CORES = (
    "Translate to French: {q}",
    "Translate to French: {q}",
    "Translate to French: {q}",
    "Translate into French: {q}",
    "Translate this to French: {q}",
    "Translate this into French: {q}",
    "Translate this sentence to French: {q}",
    "Translate the sentence into French: {q}",
    "Please translate to French: {q}",
    "Translate {q} to French.",
    "Translate {q} into French.",
    "How do you say {q} in French?",
    "What is {q} in French?",
    "What's {q} in French?",
    "Say {q} in French.",
    "Write {q} in French.",
    "Give the French translation of {q}",
    "Give me the French for {q}",
    "In French, please: {q}",
    "French translation: {q}",
    "Can you translate {q} to French?",
    "How would you say {q} in French?",
    "I need {q} in French.",
    "English to French: {q}",
    "From English to French, please: {q}",
    "Translate this from English: {q}",
    "Translate the English sentence {q} into French.",
    "Please translate {q} from English to French.",
    "Put {q} into French.",
    "Put this into French: {q}",
    "Turn {q} into French.",
    "Tell me {q} in French.",
    "I want {q} in French.",
    "I would like to read {q} in French.",
    "How does one say {q} in French?",
    "How is {q} written in French?",
    "What would {q} be in French?",
    "Express {q} in French.",
    "The French for {q} is",
    "Now in French: {q}",
)
QUOTES = ("'{s}'", "'{s}'", "'{s}'", '"{s}"', '"{s}"', "{s}")


def french(noun: str, adjective: str) -> str:
    """The French sentence for "The {noun} is {adjective}."."""
    name, gender = NOUNS[noun]
    form = ADJECTIVES[adjective][gender == "f"]
    return f"{name[0].upper()}{name[1:]} est {form}."


def translation_example(prompt: str, noun: str, adjective: str) -> Example:
    """The exchange for one sentence of the grammar."""
    name, gender = NOUNS[noun]
    form = ADJECTIVES[adjective][gender == "f"]
    thought = f"In French, the {noun} is {name} and {adjective} is {form}."
    return Example("translation", prompt, thought, french(noun, adjective))


def translation(rng: random.Random) -> Example:
    """One sentence of a small noun-adjective grammar."""
    pairs = [p for p in product(NOUNS, ADJECTIVES) if p not in UNSEEN_SENTENCES]
    noun, adjective = rng.choice(pairs)
    sentence = f"The {noun} is {adjective}."
    if rng.random() < 0.15:
        sentence = sentence[:-1]
    quoted = rng.choice(QUOTES).format(s=sentence)
    prompt = ask_with(rng, rng.choice(TRANSLATE_CORES).format(q=quoted), LONG_CLOSINGS)
    return translation_example(prompt, noun, adjective)


# Code ---------------------------------------------------------------------------------------

FUNCTIONS: dict[str, tuple[str, str, str]] = {
    "the sum of two numbers": ("add", "a, b", "a + b"),
    "the difference of two numbers": ("subtract", "a, b", "a - b"),
    "the product of two numbers": ("multiply", "a, b", "a * b"),
    "the quotient of two numbers": ("divide", "a, b", "a / b"),
    "the larger of two numbers": ("larger", "a, b", "max(a, b)"),
    "the smaller of two numbers": ("smaller", "a, b", "min(a, b)"),
    "the average of two numbers": ("average", "a, b", "(a + b) / 2"),
    "the square of a number": ("square", "x", "x * x"),
    "the double of a number": ("double", "x", "2 * x"),
    "the absolute value of a number": ("absolute", "x", "abs(x)"),
    "the length of a string": ("length", "text", "len(text)"),
    "the first item of a list": ("first", "items", "items[0]"),
    "the last item of a list": ("last", "items", "items[-1]"),
}
CODE_CORES = (
    "Write a Python function that returns {x}.",
    "Write a Python function that returns {x}.",
    "Write a Python function that returns {x}.",
    "Write a Python function which returns {x}.",
    "Write a Python function to return {x}.",
    "Write a Python function that computes {x}.",
    "Write a function in Python that returns {x}.",
    "Write a function that returns {x}.",
    "Write Python code that returns {x}.",
    "Write Python code for {x}.",
    "Give me a Python function that returns {x}.",
    "Show me a Python function that returns {x}.",
    "Show a Python function for {x}.",
    "Can you write a Python function that returns {x}?",
    "Could you write a function that computes {x}?",
    "I need a Python function that returns {x}.",
    "I need a function that gives {x}.",
    "Create a Python function that returns {x}.",
    "Define a function that returns {x}.",
    "How do I write a Python function that returns {x}?",
    "How can I get {x} in Python?",
    "Python function: return {x}.",
    "In Python, write a function that returns {x}.",
)


def code(rng: random.Random) -> Example:
    """A Python function of one line."""
    aim = rng.choice([*FUNCTIONS, "the sum of two numbers"])
    name, arguments, body = FUNCTIONS[aim]
    prompt = ask_with(rng, rng.choice(CODE_CORES).format(x=aim), LONG_CLOSINGS)
    thought = f"The user wants a Python function for {aim}. It returns {body}."
    answer = f"```python\ndef {name}({arguments}):\n    return {body}\n```"
    return Example("code", prompt, thought, answer)


# Summaries ----------------------------------------------------------------------------------

ANIMALS = ("fox", "dog", "cat", "horse", "rabbit", "wolf", "bear", "goat", "mouse", "cow")
MANNERS = ("quick brown", "small grey", "old white", "big black", "young", "tired", "lazy", "happy")
MOVES = ("jumps over", "runs behind", "sleeps beside", "walks past", "looks at", "waits for")
PLACES = ("river bank", "garden gate", "old barn", "village school", "stone bridge", "forest edge")
DAYS = ("on a sunny day", "on a rainy day", "on a cold morning", "in the evening", "at night")
PEOPLE = ("Anna", "Peter", "Maria", "Tom", "Lucy", "Paul")
GOODS = ("bread", "apples", "a book", "a hat", "some tea", "flowers")
SHOPS = ("market", "shop", "station", "village", "harbour")
UNSEEN_PAIRS = frozenset(
    {("cat", "horse"), ("wolf", "rabbit"), ("bear", "dog"), ("goat", "mouse"), ("cow", "fox")}
)
SUMMARY_CORES = (
    "Summarize in one sentence: {t}",
    "Summarize in one sentence: {t}",
    "Summarize in one sentence: {t}",
    "Summarize this in one sentence: {t}",
    "Summarize the text in one sentence: {t}",
    "Summarize this: {t}",
    "Summarize: {t}",
    "Please summarize: {t}",
    "Give a one sentence summary: {t}",
    "Give me a short summary of this text: {t}",
    "Write a short summary: {t}",
    "Write one sentence that sums this up: {t}",
    "Make this shorter: {t}",
    "Shorten this text: {t}",
    "What is the main point of this text? {t}",
    "In one sentence, what happens here? {t}",
    "Sum this up: {t}",
    "Summary in one sentence, please: {t}",
)


def animal_text(rng: random.Random, first: str, second: str) -> tuple[str, str, str]:
    """A sentence about two animals, its summary, and what it is about."""
    manner, other = rng.sample(MANNERS, 2)
    move, place, day = rng.choice(MOVES), rng.choice(PLACES), rng.choice(DAYS)
    text = f"The {manner} {first} {move} the {other} {second} near the {place} {day}."
    return text, f"A {first} {move} a {second}.", f"a {first} and a {second}"


def errand_text(rng: random.Random) -> tuple[str, str, str]:
    """A sentence about an errand, its summary, and what it is about."""
    person, goods, shop = rng.choice(PEOPLE), rng.choice(GOODS), rng.choice(SHOPS)
    start = rng.choice(("In the morning, ", "Last week, ", "After work, ", "Yesterday, "))
    tail = rng.choice(
        ("and then came home by bus", "and talked with a friend", "and went home in the rain")
    )
    text = f"{start}{person} walked to the {shop}, bought {goods} {tail}."
    return text, f"{person} bought {goods} at the {shop}.", f"{person} and {goods}"


def summary(rng: random.Random) -> Example:
    """A short text to be told in a few words."""
    if rng.random() < 0.7:
        pairs = [p for p in product(ANIMALS, ANIMALS) if p[0] != p[1] and p not in UNSEEN_PAIRS]
        text, short, about = animal_text(rng, *rng.choice(pairs))
    else:
        text, short, about = errand_text(rng)
    shown = rng.choice(("{t}", "{t}", "{t}", "'{t}'", '"{t}"')).format(t=text)
    prompt = ask_with(rng, rng.choice(SUMMARY_CORES).format(t=shown), ("",))
    thought = f"The text is about {about}. I keep only the main point."
    return Example("summary", prompt, thought, short)


# Pictures -----------------------------------------------------------------------------------

UNSEEN_COLORS = frozenset(
    {("blue", "red"), ("green", "yellow"), ("yellow", "green"), ("purple", "orange")}
)
PICTURE_CORES = (
    "What color is the {s} half of this image?",
    "What color is the {s} half of this image?",
    "What color is the {s} half of this image?",
    "What color is the {s} half of the image?",
    "What color is the {s} half of the picture?",
    "What color is the {s} half?",
    "What color is the {s} side of this image?",
    "What colour is the {s} half of this picture?",
    "What colour is the {s} side?",
    "What is the color of the {s} half of this image?",
    "What is the color of the {s} side of the picture?",
    "Which color is the {s} half of this image?",
    "Which color do you see on the {s}?",
    "Which color is on the {s} side?",
    "Tell me the color of the {s} half.",
    "Tell me which color is on the {s}.",
    "Name the color of the {s} half of this image.",
    "Name the color on the {s}.",
    "Look at the {s} half of the image. What color is it?",
    "Look at the picture. What color is on the {s}?",
    "The {s} half of this image is what color?",
    "The color of the {s} half is",
    "Color of the {s} half?",
    "Do you see the {s} half? What color is it?",
    "On the {s} side, what color is there?",
    "Give me the color of the {s} side.",
)
SMALL_SIZES = ((64, 64), (128, 64), (64, 32), (128, 128), (192, 96), (96, 96), (160, 64))
LARGE_SIZES = ((256, 128), (320, 160), (256, 256), (448, 224), (448, 224))


def picture_example(prompt: str, side: str, picture: Picture) -> Example:
    """The exchange about one side of a picture."""
    color = picture.left if side == "left" else picture.right
    thought = f"The user asks about the {side} half of the image. The {side} half is {color}."
    return Example("picture", prompt, thought, color, picture)


def any_color(rng: random.Random) -> str:
    """A colour without a name."""
    return f"#{rng.randrange(1 << 24):06x}"


def picture(rng: random.Random, plain_share: float) -> Example:
    """A picture and a question about one side of it.

    Most pictures have any colour at all on the other side: were both sides always named, a pair
    that is trained in one order only could be answered without looking at sides.
    """
    pairs = [p for p in product(COLORS, COLORS) if p[0] != p[1] and p not in UNSEEN_COLORS]
    left, right = rng.choice(pairs)
    side = rng.choice(("left", "right"))
    chance = rng.random()
    if chance < plain_share:
        right = left
    elif chance < plain_share + 0.6:
        left, right = (left, any_color(rng)) if side == "left" else (any_color(rng), right)
    size = rng.choice(SMALL_SIZES if rng.random() < 0.8 else LARGE_SIZES)
    jitter = rng.randrange(1, 1 << 30) if rng.random() < 0.6 else 0
    prompt = ask_with(rng, rng.choice(PICTURE_CORES).format(s=side), SHORT_CLOSINGS)
    return picture_example(prompt, side, Picture(left, right, size, jitter))


OTHER_SUBJECTS: dict[Callable[[random.Random], Example], float] = {
    capital: 0.16,
    translation: 0.20,
    code: 0.16,
    summary: 0.18,
}
LATE_SUBJECTS = {**OTHER_SUBJECTS, leftover: 0.14, late_capital: 0.14}
"""With wordings for the last stage, so that what is asked is not told from single words."""


def _with_system(rng: random.Random, example: Example) -> Example:
    if rng.random() >= 0.06:
        return example
    return Example(
        example.subject,
        example.prompt,
        example.thought,
        example.answer,
        example.picture,
        rng.choice(SYSTEMS),
    )


def text_examples(
    seed: int, count: int, arithmetic_share: float, *, late: bool = False
) -> list[Example]:
    """`count` seeded text exchanges: a share of arithmetic, the other subjects by weight."""
    rng = random.Random(seed)
    subjects = LATE_SUBJECTS if late else OTHER_SUBJECTS
    makers = [arithmetic, *subjects]
    others = sum(subjects.values())
    weights = [arithmetic_share]
    weights += [(1 - arithmetic_share) * w / others for w in subjects.values()]
    return [_with_system(rng, rng.choices(makers, weights)[0](rng)) for _ in range(count)]


def picture_examples(seed: int, count: int, plain_shares: Sequence[float]) -> list[Example]:
    """`count` seeded exchanges about pictures, with a share of one-coloured ones for each stretch.

    Those teach the names of the colours before the sides have to be told apart; without them the
    network answers with a random colour for hundreds of steps.
    """
    rng = random.Random(seed)
    shares = (plain_shares[len(plain_shares) * i // count] for i in range(count))
    return [_with_system(rng, picture(rng, share)) for share in shares]
