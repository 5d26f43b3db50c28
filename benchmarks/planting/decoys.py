"""Texts that resemble a defect and are none: an audit that flags one of them cries wolf."""

from __future__ import annotations

import random
from collections.abc import Callable

from planting.confidential import PERSONAL

_HEX = "0123456789abcdef"


def _not_a_card(rng: random.Random) -> str:
    """Sixteen digits that fail the Luhn check: a valid number with its last digit changed."""
    make, _ = PERSONAL["payment card"]
    digits = "".join(c for c in make(rng) if c.isdigit())
    return digits[:-1] + str((int(digits[-1]) + rng.randint(1, 9)) % 10)


#: The class it tempts -> sentences, or makers of one.
DECOYS: dict[str, tuple[str | Callable[[random.Random], str], ...]] = {
    "secret": (
        lambda r: f"The fix is in commit {''.join(r.choices(_HEX, k=40))}.",
        lambda r: f"The file's MD5 sum is {''.join(r.choices(_HEX, k=32))}.",
        lambda r: "Request id " + "-".join("".join(r.choices(_HEX, k=k)) for k in (8, 4, 4, 4, 12)) + " was refused.",
        "Set api_key = YOUR_API_KEY before you start.",
        "The password is ******** and nobody knows it.",
        "I use scikit-learn with sk-style pipelines and a task-runner.",
        "Open https://docs.python.org/3/library/secrets.html#generating-tokens first.",
        "A token is about four characters; a key signature is something else.",
        "Her user name is hf_reader and her role is npm_maintainer.",
        "The gene AKIAP1 was not found in sample SG.1.2.",
    ),
    "personal_data": (
        lambda r: f"My order number is {_not_a_card(r)}.",
        lambda r: f"The sum is {r.randint(10**6, 10**7):,}.{r.randint(10, 99)} in all.",
        lambda r: f"The meeting is on 20{r.randint(10, 29)}-{r.randint(1, 12):02d}-{r.randint(1, 28):02d} at 10:30.",
        lambda r: f"Multiply {r.randint(10**8, 10**9)} by {r.randint(100, 999)}.",
        "The server at 192.168.0.17 answers on 127.0.0.1 only.",
        "Follow @acme on the web, or ask user@localhost.",
        "In Python, @dataclass stands above the class and a @ b multiplies matrices.",
        "The room is 12.5 x 8.25 x 3 m, parts 10-20-30 and 4-5-6.",
        "Pi is 3.14159265358979 and e is 2.718281828459045.",
        "We sell apples @ 3 for $2.50.",
    ),
    "mojibake": (
        "The menu lists crème brûlée, jalapeños and Weißwurst.",
        "NÃO ENTRE was written on the door in São João.",
        "The Ångström, the Łódź metro and the naïve façade.",
        "A € is worth more than a ¥, and a £ more than a €.",
        "The symbols ©, ®, ™, § and ¶ are in every font.",
        "Solve x² − 3x ≤ 10 for x ∈ ℝ, where ∑ and √ are as usual.",
        "L'âge d'or, “his” and ‘hers’, 5′ 11″ – all typographic.",
    ),
    "hidden_unicode": (
        "My family 👨‍👩‍👧‍👦 likes the ❤️ and the 🏳️‍🌈.",
        "The flag of England is 🏴󠁧󠁢󠁥󠁮󠁧󠁿 and that of Scotland 🏴󠁧󠁢󠁳󠁣󠁴󠁿.",
        "The Persian word for bookshop is کتاب‌فروشی.",
        "Press 1️⃣ or ☎️ to speak with a 👩‍💻.",
        "The Hindi word क्‍ष shows a half letter.",
        "Non\u00a0breaking spaces stand in 10\u00a0km and in 5\u00a0%.",
        "Shalom is שלום and salaam is سلام.",
    ),
    "control_token_text": (
        "If a < b | c > d then swap them.",
        "List<String> and Map<Integer, User> are Java types; <b>bold</b> is HTML.",
        "# Heading\n\n## Second\n\nA paragraph of Markdown.",
        "The human: assistant ratio is 3:1; the user: admin ratio is not.",
        "Look at figure [1], table [A] and the [INSTALL] file.",
        "The pipe |> passes a value in F#, and <- assigns in R.",
        "She was an Assistant Professor, he a System Administrator.",
    ),
    "language": (
        "He said “bonjour”, she answered “guten Tag”, and they went to the café in Montréal.",
        "The restaurant La Dolce Vita in Los Angeles serves tacos al pastor.",
        "for i in range(10): print(i ** 2)  # squares",
        "x = 3y + 2z; y = 4; z = 7",
        "PLEASE ANSWER QUICKLY, I AM IN A HURRY.",
        "Schadenfreude and déjà vu are English words by now.",
    ),
}  # fmt: skip


def tempt(kind: str, rng: random.Random) -> str:
    """A sentence that resembles a defect of the class."""
    chosen = rng.choice(DECOYS[kind])
    return chosen if isinstance(chosen, str) else chosen(rng)
