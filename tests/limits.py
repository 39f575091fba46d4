"""What the files may hold, in one place: the tests that assert these say which grew."""

README_LINES = 250
SIX_FILES = ("stage_a.py", "stage_b.py", "stage_c.py", "semantic_compressor.py", "sample.py",
             "data.py")
SIX_FILES_LINES = 2450                 # all together
FOLDER_LINES = {"plumbing": 1300, "sources": 450}
TEST_SHAPES_LINES = 600
TRAIN_LINES = {"stage_a.py": 70, "stage_b.py": 90, "stage_c.py": 70}
HELP_LINES = 60                        # what `python stage_?.py --help` prints
COLUMNS = 100

# What each file or folder may import of the project, and what only inside a function.
FLOORS = {
    "plumbing": {"plumbing"},
    "sources": {"plumbing", "sources"},
    "published": {"plumbing", "published"},
    "data.py": {"plumbing", "sources"},
    "semantic_compressor.py": {"plumbing"},
    "stage_a.py": {"data", "plumbing", "pocket.shapes"},
    "stage_b.py": {"data", "plumbing", "pocket.shapes", "semantic_compressor", "stage_a"},
    "stage_c.py": {"data", "plumbing", "pocket.shapes", "semantic_compressor", "stage_a",
                   "stage_b"},
    "sample.py": {"data", "plumbing", "semantic_compressor", "stage_a", "stage_b", "stage_c"},
    "pocket/shapes.py": {"plumbing", "sources"},
}
LAZY = {                               # foreign formats, read when such a file is given
    "plumbing/checkpoint.py": {"published.weights"},
    "plumbing/text.py": {"published.hub", "published.text", "pocket.text"},
    "sample.py": {"published.hub", "tools.explain"},
    "published/export.py": {"sample"}}
