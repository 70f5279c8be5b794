"""Which activation calls a model makes, and the code that redirects each of them."""

from transfer_surgery.sites.arguments import example_arguments, fake_arguments
from transfer_surgery.sites.caller import Recipe, extend_class, prepare_recipes, rewritten_class
from transfer_surgery.sites.find import find_activations
from transfer_surgery.sites.frames import names_read
from transfer_surgery.sites.graph import GraphRoute, edit_graph, restore_graph
from transfer_surgery.sites.holders import swap_children
from transfer_surgery.sites.plan import Plan
from transfer_surgery.sites.site import Site
from transfer_surgery.sites.stand_in import probe_copy, trying, undisturbed
from transfer_surgery.sites.zoo import Adapter, describe_baked, find_example_input, stages_of

__all__ = [
    "Adapter",
    "GraphRoute",
    "Plan",
    "Recipe",
    "Site",
    "describe_baked",
    "edit_graph",
    "example_arguments",
    "extend_class",
    "fake_arguments",
    "find_activations",
    "find_example_input",
    "names_read",
    "prepare_recipes",
    "probe_copy",
    "restore_graph",
    "rewritten_class",
    "stages_of",
    "swap_children",
    "trying",
    "undisturbed",
]
