"""What methods and options say of themselves, read from their source, is what they say when they are imported."""

import pytest

from vitrim.catalog import COLUMNS, field_docs, method_rows
from vitrim.config.options import RecoverOptions, RepairOptions
from vitrim.config.steps import Step
from vitrim.methods import METHODS, Dgmr, LowRank


@pytest.mark.parametrize("method", METHODS)
def test_a_method_says_what_each_option_is(method):
    assert all(field.description for field in METHODS[method].model_fields.values())


def test_the_catalog_is_the_registry_in_the_same_order():
    own = [entry for entry in METHODS.values() if entry.__module__.startswith("vitrim.")]
    plain = [name for name in COLUMNS if name != "edit"]
    assert method_rows() == [
        {**{name: getattr(entry, name) for name in plain}, "edit": entry.edits_in_words()} for entry in own
    ]


@pytest.mark.parametrize("entry", [Step, RecoverOptions, RepairOptions, Dgmr, LowRank], ids=lambda e: e.__name__)
def test_the_documentation_of_fields_is_read_as_pydantic_reads_it(entry):
    module = entry.__module__.removeprefix("vitrim.")
    wanted = {name: " ".join(str(field.description).split()) for name, field in entry.model_fields.items()}
    assert field_docs(module, entry.__name__) == wanted
