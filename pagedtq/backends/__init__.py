"""Where page bytes live and move: one module per device, same operations, same bytes."""
