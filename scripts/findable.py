"""Makes the package ``scripts`` that this file lies in the one that is imported, from whatever folder.

The configurations run this file by its path, before they name anything of ``scripts``; it imports nothing of the package.
A package ``scripts`` of another bundle, loaded in the same process, is forgotten: what was made of it goes on as it is. The
bundles of the repository share one package through their links, which stays loaded.
"""

import os
import sys

FOLDER = os.path.dirname(os.path.abspath(__file__))  # links are not followed, so that its parent is the bundle
ROOT = os.path.dirname(FOLDER)

if sys.path[:1] != [ROOT]:
    sys.path.insert(0, ROOT)

loaded = getattr(sys.modules.get("scripts"), "__path__", ())
if os.path.realpath(FOLDER) not in map(os.path.realpath, loaded):
    for name in [name for name in sys.modules if name.partition(".")[0] == "scripts"]:
        del sys.modules[name]
