"""kvtoolkit under other people's models. Each module needs its own packages, and nothing else imports them."""
