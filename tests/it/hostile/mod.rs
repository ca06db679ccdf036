//! Every row of the threat table (`tests/threats.tsv`): the answer, and that it harmed nobody else.

mod edge;
mod floods;
mod frames;
mod http;
mod load;
mod names;
pub mod panic;
mod strangers;
pub mod target;
mod tokens;
