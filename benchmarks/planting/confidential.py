"""Made-up keys of real issuers' shapes, and made-up personal data with valid check digits.

Every value is drawn at random; no string in this file is a key, and no mail domain is a provider's. Telephone numbers come from
the ranges that regulators keep for fiction where a country has them (NANP 555-01xx, Ofcom 7946 0xxx and 07700 900xxx, ARCEP
06 39 98, ACMA 0491 570).
"""

from __future__ import annotations

import base64
import json
import random
import string
from collections.abc import Callable

_ALNUM = string.ascii_letters + string.digits
_URL_SAFE = _ALNUM + "-_"
_BASE64 = _ALNUM + "+/"
_HEX = "0123456789abcdef"
_UPPER = string.ascii_uppercase + string.digits

Maker = Callable[[random.Random], str]


def _some(rng: random.Random, alphabet: str, length: int) -> str:
    return "".join(rng.choices(alphabet, k=length))


# ---- secrets --------------------------------------------------------------------------------------------------------


def _jwt(rng: random.Random) -> str:
    def part(value: dict[str, object]) -> str:
        return base64.urlsafe_b64encode(json.dumps(value, separators=(",", ":")).encode()).decode().rstrip("=")

    header = part({"alg": rng.choice(["HS256", "HS512"]), "typ": "JWT"})
    issued = rng.randint(1_600_000_000, 1_750_000_000)
    body = part({"sub": _some(rng, string.digits, 10), "name": rng.choice(_FIRST), "iat": issued, "exp": issued + 3600})
    return f"{header}.{body}.{_some(rng, _URL_SAFE, 43)}"


def _private_key(rng: random.Random) -> str:
    kind = rng.choice(["RSA PRIVATE KEY", "EC PRIVATE KEY", "OPENSSH PRIVATE KEY", "PRIVATE KEY", "DSA PRIVATE KEY"])
    lines = [_some(rng, _BASE64, 64) for _ in range(rng.randint(3, 8))] + [_some(rng, _BASE64, rng.randint(20, 60)) + "="]
    return "\n".join([f"-----BEGIN {kind}-----", *lines, f"-----END {kind}-----"])


def _connection(rng: random.Random) -> str:
    scheme, port = rng.choice(
        [("postgres", 5432), ("postgresql", 5432), ("mysql", 3306), ("mongodb+srv", 0), ("redis", 6379), ("amqp", 5672)]
    )
    user = rng.choice(["admin", "app", "svc_orders", "root", "reporting", "deploy"])
    password = _some(rng, _ALNUM, rng.randint(10, 18))
    host = (
        f"{rng.choice(['db', 'prod-db', 'cache01', 'sql-eu', 'broker'])}.{rng.choice(['internal.corvane.io', 'aldermoor.net'])}"
    )
    name = rng.choice(["orders", "billing", "prod", "users", "0"])
    return f"{scheme}://{user}:{password}@{host}{f':{port}' if port else ''}/{name}"


def _azure(rng: random.Random) -> str:
    account = rng.choice(["prodstore", "backupseu", "invoices"]) + _some(rng, string.digits, 3)
    key = _some(rng, _BASE64, 86) + "=="
    return f"DefaultEndpointsProtocol=https;AccountName={account};AccountKey={key};EndpointSuffix=core.windows.net"


def _slack_hook(rng: random.Random) -> str:
    return f"https://hooks.slack.com/services/T{_some(rng, _UPPER, 8)}/B{_some(rng, _UPPER, 10)}/{_some(rng, _ALNUM, 24)}"


def _assignment(rng: random.Random) -> str:
    name = rng.choice(["DB_PASSWORD", "password", "api_key", "SECRET_KEY", "client_secret", "auth_token", "ADMIN_PASSWORD"])
    value = _some(rng, _ALNUM + "!#%&*+-?^_", rng.randint(14, 24)) if "ass" in name else _some(rng, _ALNUM, rng.randint(24, 40))
    return rng.choice([f'{name} = "{value}"', f"{name}={value}", f"{name}: {value}", f'"{name}": "{value}"'])


#: Issuer -> what makes one of its keys.
SECRETS: dict[str, Maker] = {
    "AWS access key": lambda r: r.choice(["AKIA", "AKIA", "ASIA"]) + _some(r, string.ascii_uppercase + "234567", 16),
    "AWS secret key": lambda r: f"aws_secret_access_key = {_some(r, _BASE64, 40)}",
    "GitHub token": lambda r: r.choice(["ghp_", "gho_", "ghs_", "ghu_"]) + _some(r, _ALNUM, 36),
    "GitHub fine-grained token": lambda r: f"github_pat_{_some(r, _ALNUM, 22)}_{_some(r, _ALNUM, 59)}",
    "GitLab token": lambda r: "glpat-" + _some(r, _URL_SAFE, 20),
    "Slack token": lambda r: (
        f"xox{r.choice('bp')}-{_some(r, string.digits[1:], 12)}-{_some(r, string.digits[1:], 12)}-{_some(r, _ALNUM, 24)}"
    ),
    "Slack webhook": _slack_hook,
    "Stripe key": lambda r: r.choice(["sk_live_", "rk_live_"]) + _some(r, _ALNUM, 24),
    "Google API key": lambda r: "AIza" + _some(r, _URL_SAFE, 35),
    "Google OAuth secret": lambda r: "GOCSPX-" + _some(r, _URL_SAFE, 28),
    "OpenAI key": lambda r: f"sk-{_some(r, _ALNUM, 20)}T3BlbkFJ{_some(r, _ALNUM, 20)}",
    "OpenAI project key": lambda r: f"sk-proj-{_some(r, _URL_SAFE, 74)}T3BlbkFJ{_some(r, _URL_SAFE, 74)}",
    "Anthropic key": lambda r: f"sk-ant-api03-{_some(r, _URL_SAFE, 93)}AA",
    "Hugging Face token": lambda r: "hf_" + _some(r, string.ascii_letters, 34),
    "SendGrid key": lambda r: f"SG.{_some(r, _URL_SAFE, 22)}.{_some(r, _URL_SAFE, 43)}",
    "Twilio key": lambda r: "SK" + _some(r, _HEX, 32),
    "npm token": lambda r: "npm_" + _some(r, _ALNUM, 36),
    "PyPI token": lambda r: "pypi-AgEIcHlwaS5vcmc" + _some(r, _URL_SAFE, 120),
    "DigitalOcean token": lambda r: "dop_v1_" + _some(r, _HEX, 64),
    "Shopify token": lambda r: "shpat_" + _some(r, _HEX, 32),
    "Telegram bot token": lambda r: f"{r.randint(10**8, 10**10 - 1)}:AA{_some(r, _URL_SAFE, 33)}",
    "JWT": _jwt,
    "private key": _private_key,
    "connection string": _connection,
    "Azure storage key": _azure,
    "bearer header": lambda r: f"Authorization: Bearer {_some(r, _URL_SAFE, r.randint(32, 48))}",
    "password or key by name": _assignment,
}
#: How people let slip a secret; an empty frame is the secret alone on a line of its own.
SECRET_FRAMES = (
    "My key is {}",
    "I tried it with {} and it failed.",
    "Here is my config:\n{}",
    "\n{}\n",
    "curl -H 'X-Api-Key: {}' https://api.corvane.io/v1/items",
    "(use {} if it asks)",
    "export TOKEN={}",
    "The log says: request with credentials {} refused.",
)


# ---- personal data --------------------------------------------------------------------------------------------------

_FIRST = (
    "Maren",
    "Tobias",
    "Aisha",
    "Joaquin",
    "Wei",
    "Priya",
    "Ewan",
    "Lucia",
    "Noor",
    "Dmitri",
    "Hanna",
    "Sergio",
    "Keiko",
    "Amara",
)
_LAST = (
    "Lindqvist",
    "Okafor",
    "Brandt",
    "Moreau",
    "Castellano",
    "Whitlock",
    "Novak",
    "Tanaka",
    "Achterberg",
    "Dasgupta",
    "Quayle",
)
_DOMAINS = (
    "quillmarsh.com",
    "tarnbridge.co.uk",
    "nordhafen.de",
    "petitvallon.fr",
    "hollowpine.org",
    "mail.arven.net",
    "ostlicht.at",
    "bluefennel.io",
)


def _digits(rng: random.Random, length: int) -> str:
    return _some(rng, string.digits, length)


def _email(rng: random.Random) -> str:
    first, last = rng.choice(_FIRST).lower(), rng.choice(_LAST).lower()
    local = rng.choice(
        [f"{first}.{last}", f"{first[0]}{last}", f"{first}_{last}{rng.randint(1, 99)}", f"{first}+{last}", f"{last}{first}"]
    )
    return f"{local}@{rng.choice(_DOMAINS)}"


def _phone(rng: random.Random) -> str:
    last, two, three, four = f"01{_digits(rng, 2)}", _digits(rng, 2), _digits(rng, 3), _digits(rng, 4)
    area = rng.choice(["212", "415", "617", "303", "206", "512", "773"])
    return rng.choice(
        [
            f"({area}) 555-{last}",
            f"{area}-555-{last}",
            f"+1 {area} 555 {last}",
            f"+1-{area}-555-{last}",
            f"{area}.555.{last}",
            f"+44 20 7946 0{three}",
            f"020 7946 0{three}",
            f"+44 7700 900{three}",
            f"07700 900{three}",
            f"+33 6 39 98 {two} {_digits(rng, 2)}",
            f"06 39 98 {two} {_digits(rng, 2)}",
            f"+49 30 23125{three}",
            f"+49 (0)30 23125 {three}",
            f"030 / 23125{three}",
            f"+34 612 {three} {_digits(rng, 3)}",
            f"+39 06 {four} {_digits(rng, 4)}",
            f"+61 491 570 {three}",
            f"0491 570 {three}",
            f"+91 98{three} {_digits(rng, 5)}",
            f"+81 3-{four}-{_digits(rng, 4)}",
            f"+55 11 9{four}-{_digits(rng, 4)}",
            f"+41 44 668 {two} {_digits(rng, 2)}",
        ]
    )


def _ssn(rng: random.Random) -> str:
    area = rng.choice([n for n in range(1, 900) if n != 666])
    return f"{area:03d}-{rng.randint(1, 99):02d}-{rng.randint(1, 9999):04d}"


def _card(rng: random.Random) -> str:
    """A number that passes the Luhn check (ISO/IEC 7812-1, annex B), as it is printed or typed."""
    start, length = rng.choice(
        [("4", 16), ("4", 16), (str(rng.randint(51, 55)), 16), (rng.choice(["34", "37"]), 15), ("6011", 16)]
    )
    digits = start + _digits(rng, length - 1 - len(start))
    # The check digit makes the sum of digits, every second one from the right doubled, a multiple of ten.
    total = 0
    for place, digit in enumerate(reversed(digits)):
        doubled = int(digit) * (2 if place % 2 == 0 else 1)
        total += doubled - 9 if doubled > 9 else doubled
    digits += str(-total % 10)
    groups = [digits[:4], digits[4:10], digits[10:]] if length == 15 else [digits[n : n + 4] for n in range(0, 16, 4)]
    return rng.choice([" ", "-", ""]).join(groups)


def _iban(rng: random.Random) -> str:
    """An IBAN whose check digits hold (ISO 7064, mod 97-10)."""
    country, body = rng.choice(
        [
            ("DE", _digits(rng, 18)),
            ("GB", rng.choice(["NWBK", "BARC", "MIDL"]) + _digits(rng, 14)),
            ("FR", _digits(rng, 23)),
            ("NL", rng.choice(["ABNA", "INGB", "RABO"]) + _digits(rng, 10)),
            ("ES", _digits(rng, 20)),
            ("CH", _digits(rng, 17)),
        ]
    )
    as_number = int("".join(str(int(c, 36)) for c in f"{body}{country}00"))
    whole = f"{country}{98 - as_number % 97:02d}{body}"
    return whole if rng.random() < 0.4 else " ".join(whole[n : n + 4] for n in range(0, len(whole), 4))


def _address(rng: random.Random) -> str:
    """An address of a host on the public network."""
    if rng.random() < 0.2:
        return f"2a02:{rng.randint(0x100, 0xFFF):x}:" + ":".join(f"{rng.randint(1, 0xFFFF):x}" for _ in range(6))
    first = rng.choice([n for n in range(11, 220) if n not in (100, 127, 169, 172, 192, 198, 203)])
    return f"{first}.{rng.randint(0, 255)}.{rng.randint(0, 255)}.{rng.randint(1, 254)}"


#: Sort of data -> what makes one, and how people write it.
PERSONAL: dict[str, tuple[Maker, tuple[str, ...]]] = {
    "e-mail": (_email, ("You can write to {}.", "my email is {}", "Contact: {}", "I registered with {} last year.", "cc {}")),
    "telephone": (_phone, ("Call me on {}.", "My number is {}.", "Tel. {}", "you can reach me at {} after six", "Phone: {}")),
    "social security number": (
        _ssn,
        ("My SSN is {}.", "Social security number: {}", "His social security number is {}.", "SSN {}"),
    ),
    "payment card": (_card, ("My card number is {}.", "I paid with {} yesterday.", "Card: {}", "charge it to {} please")),
    "IBAN": (_iban, ("Send it to {}.", "My IBAN is {}.", "IBAN: {}", "The refund goes to {}.")),
    "IP address": (
        _address,
        ("I logged in from {}.", "Client IP: {}", "The request came from {} at noon.", "server {} refused it"),
    ),
}
