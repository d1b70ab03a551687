"""The `shardlift` command."""
