"""A hundred million bytes of text that every package index has: the sources of eight libraries.

Wheels without compiled code, each of one version and known by its digest, so that the text is the
same everywhere. It stays under its own licences: BSD (sympy, networkx, django, sphinx), Apache 2.0
(nova, neutron, jax), MIT (twisted).
"""

import zipfile
from collections.abc import Iterator

import tqdm

from data import wheels

#: Wheel -> its sha256.
WHEELS = {
    "sympy==1.14.0": "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
    "nova==34.0.0": "8b46997836961762608e6e46e6d4945325d8a1fb8004e79e552e55839061f10c",
    "neutron==29.0.0": "6e998e2e55d233ff757f3ae1d53dd8dfd2cb455a01868e494c22fd6b8b0aba36",
    "twisted==25.5.0": "8559f654d01a54a8c3efe66d533d43f383531ebf8d81d9f9ab4769d91ca15df7",
    "jax==0.8.0": "d190158bc019756c6a0f6b3d5fc8783471fb407e6deaff559eaac60dd5ee850a",
    "networkx==3.5": "0030d386a9a06dee3565298b4a734b68589749a544acbb6c412dc9e2489ec6ec",
    "django==5.2.8": "37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f",
    "sphinx==8.2.3": "4405915165f13521d875a8c29c8970800a0141c14cc5416a38feca4ea5d9b9c3",
}


def documents() -> Iterator[str]:
    """Every Python file of the libraries, in an order that is always the same.

    Raises:
      RuntimeError: a wheel can be neither found nor fetched, or is another one.
    """
    for wheel, sha256 in tqdm.tqdm(WHEELS.items(), desc="libraries", leave=False):
        with zipfile.ZipFile(wheels.fetch(wheel, None, sha256)) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(".py"):
                    # A test file of another encoding loses what is no UTF-8; nothing else does.
                    yield archive.read(name).decode("utf-8", errors="replace")
