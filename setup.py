"Packaging for pip: everything it says is read from settings.ini."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
settings = ConfigParser(delimiters=['='])
settings.read(here/'settings.ini', encoding='utf-8')
cfg = settings['DEFAULT']
extras = {name: cfg[f'{name}_requirements'].split() for name in ('zoo', 'transformers', 'export', 'notebooks', 'dev')}
oldest, newest = (int(cfg[f'{end}_python'].split('.')[1]) for end in ('min', 'max'))
pythons = [f'3.{minor}' for minor in range(oldest, newest + 1)]

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=(here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    project_urls={'Documentation': cfg['doc_host'] + cfg['doc_baseurl'], 'Source': cfg['git_url'],
                  'Issues': cfg['git_url'] + '/issues', 'Changelog': cfg['git_url'] + '/blob/main/CHANGELOG.md'},
    license='Apache-2.0',
    license_files=['LICENSE'],
    keywords=cfg['keywords'],
    classifiers=['Development Status :: 3 - Alpha',
                 'Intended Audience :: Science/Research', 'Intended Audience :: Developers',
                 'Operating System :: POSIX :: Linux', 'Operating System :: MacOS',
                 'Topic :: Scientific/Engineering :: Artificial Intelligence',
                 'Topic :: Scientific/Engineering :: Image Recognition',
                 'Typing :: Typed', 'Programming Language :: Python :: 3',
                 *(f'Programming Language :: Python :: {version}' for version in pythons)],
    python_requires=f'>={cfg["min_python"]}',
    packages=find_packages(include=['radio_nb', 'radio_nb.*']),
    package_data={'radio_nb': ['weights/*', 'recipes/*', 'py.typed']},
    install_requires=cfg['requirements'].split(),
    extras_require=extras,
    entry_points={'console_scripts': cfg['console_scripts'].split()},
    zip_safe=False,
)
