"""The wire contract: `.proto` files, the code generated from them, and what both sides share about them."""
