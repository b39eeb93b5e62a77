"""Plain torch over tiles of the bag: O(tile) memory, own backward, products by torch's libraries."""
