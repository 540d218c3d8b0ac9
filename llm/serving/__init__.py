"""The server: continuous batching, OpenAI's API over it, and a page to look at."""
