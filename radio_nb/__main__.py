"`python -m radio_nb` is the command `radio-nb`."
from radio_nb.front.cli import main

if __name__ == '__main__': main()
