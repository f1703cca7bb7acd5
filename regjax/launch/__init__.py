"""`regjax launch`: one command that starts a job of several processes, and starts it again."""
