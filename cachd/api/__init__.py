"""The HTTP API. Routes validate, call one thing below, and answer; they decide nothing."""
