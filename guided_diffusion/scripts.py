"""What the two scripts share: how they speak, and how they end."""

import os
import sys
import warnings

from .errors import InputError


def say(text):
    """Print one line of progress to standard error."""
    print(text, file=sys.stderr, flush=True)


def run_script(main):
    """Run a script's main function; print bad input as one line and exit with code 2, and system errors with code 1."""
    warnings.simplefilter("once")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"
    try:
        main()
    except InputError as error:
        sys.exit(_complain(error, 2))
    except OSError as error:
        sys.exit(_complain(error, 1))
    except RuntimeError as error:
        text = str(error)
        if "out of memory" not in text and "can't allocate memory" not in text and "killed by signal" not in text:
            raise
        hint = "out of memory? lower --batch_size or --microbatch, or set --use_checkpoint True"
        sys.exit(_complain(f"{text.splitlines()[0][:200]} ({hint})", 1))
    except KeyboardInterrupt:
        sys.exit(_complain("interrupted", 130))


def _complain(error, code):
    print(f"{os.path.basename(sys.argv[0])}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code
