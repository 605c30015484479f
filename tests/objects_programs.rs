//! Programs that people run, on a mounted bucket; and on a plain directory, to see that it is not the programs.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod common;

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::files::{names, noise, output, python, same, sh};
use common::mount::{Service, Tree, on};

/// On a plain directory, and on a bucket in MinIO.
macro_rules! programs {
    ($($test:ident),+ $(,)?) => {
        mod plain {
            $(#[test] fn $test() { super::on(super::Service::Plain, super::$test); })+
        }
        mod minio {
            $(#[test] fn $test() { super::on(super::Service::Minio, super::$test); })+
        }
    };
}

programs!(
    git_clones_commits_and_checks,
    python_environments_work,
    tar_and_rsync_agree,
    sqlite_keeps_its_promises,
    checkpoints_are_written_and_renamed,
    event_files_are_appended_to_and_followed,
    arrays_are_mapped,
    files_are_written_out_of_order,
    archives_are_made,
    fio_verifies_what_it_wrote,
    random_operations_with_maps_agree,
    a_directory_has_a_hundred_thousand_entries,
);

fn have(program: &str) -> bool {
    let found = output(Path::new("/"), &["sh", "-c", &format!("command -v {program}")]).status.success();
    if !found {
        println!("SKIPPED {}: no {program}", module_path!());
    }
    found
}

/// > git clones, shows a clean status, commits, repacks, and finds nothing wrong.
fn git_clones_commits_and_checks(tree: &Tree) {
    if !have("git") {
        return;
    }
    let mount = tree.mount();
    let source = tree.dir.path().join("source");
    fs::create_dir(&source).unwrap();
    let setup = "
        export GIT_CONFIG_GLOBAL=/dev/null GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@b GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@b";
    let make = "
        git init -q -b main .
        for d in 1 2 3 4 5; do mkdir d$d; for f in $(seq 12); do seq $d $((f * 20)) >d$d/f$f; done; git add .; git commit -qm $d; done
        ln -s d1/f1 link; echo 'echo hello' >run; chmod +x run; git add .; git commit -qm more";
    sh(&source, &format!("{setup}\n{make}"));
    let work = format!(
        "
        {setup}
        git clone -q {} clone
        cd clone
        test -z \"$(git status --porcelain)\"
        test $(git ls-files | wc -l) = 62; ./run | grep -q hello; test -L link
        echo changed >>d1/f1; git status --porcelain | grep -q '^ M d1/f1$'
        git commit -qam change; git checkout -q -b other HEAD~3; git checkout -q main
        git gc -q; git fsck --full --strict --no-progress >/dev/null; test -z \"$(git status --porcelain)\"
        git log --oneline | wc -l",
        source.display()
    );
    assert_eq!(sh(&mount.path, &work).trim(), "7");
    let other = tree.elsewhere();
    let check = format!(
        "{setup}; export GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=safe.directory GIT_CONFIG_VALUE_0='*'
        cd clone; git fsck --full --strict --no-progress; git status --porcelain"
    );
    assert_eq!(sh(&other.path, &check), "");
}

/// > python makes an environment, pip installs into it, and what was installed runs, on another node as well.
fn python_environments_work(tree: &Tree) {
    let mount = tree.mount();
    // Without a pip of its own, which is 1,500 files more.
    sh(&mount.path, "python3 -m venv --without-pip env");
    let pip = ["python3", "-m", "pip", "--python", "env/bin/python"];
    let installed = output(&mount.path, &[&pip[..], &["install", "--quiet", "--retries", "1", "idna", "six"]].concat());
    if !installed.status.success() {
        let why = String::from_utf8_lossy(&installed.stderr).into_owned();
        assert!(why.contains("No matching distribution") || why.contains("onnection"), "{why}");
        println!("SKIPPED {}: no package registry", module_path!());
        return;
    }
    let run = "env/bin/python -c 'import idna, six; print(idna.encode(\"bücher.example\").decode())'";
    assert_eq!(sh(&mount.path, run).trim(), "xn--bcher-kva.example");
    sh(&mount.path, "python3 -m pip --python env/bin/python check");
    if !tree.is_plain() {
        let other = tree.elsewhere();
        let run = "PYTHONPATH=$(echo env/lib/python3*/site-packages) python3 -c 'import idna; print(idna.__file__)'";
        assert!(sh(&other.path, run).contains("site-packages"));
    }
}

/// > tar unpacks with modes, owners and times, and a second rsync transfers nothing.
fn tar_and_rsync_agree(tree: &Tree) {
    if !have("rsync") {
        return;
    }
    let mount = tree.mount();
    let source = tree.dir.path().join("source");
    fs::create_dir(&source).unwrap();
    let make = "
        for d in $(seq 8); do mkdir -p a/d$d/e; for f in $(seq 15); do seq $f >a/d$d/f$f; done; seq 5000 >a/d$d/e/larger; done
        ln -s f1 a/d1/link; chmod 600 a/d1/f2; chmod 4755 a/d1/f3; chown 1000:100 a/d1/f4; mkdir -m 700 a/empty
        touch -d '1999-12-31 23:59:59.123456789' a/d2/f1 a/d3; touch -d '2001-01-01' a/d4/e a/d4
        truncate -s 9M a/sparse; mkfifo a/pipe; tar cf ../a.tar a";
    sh(&source, make);
    sh(&mount.path, "tar xpf ../a.tar; ls a/d1 | wc -l");
    let source = source.display();
    let differences =
        format!("rsync -aHAX --no-xattrs --no-acls --checksum --dry-run --itemize-changes --delete {source}/a/ a/");
    assert_eq!(sh(&mount.path, &differences), "");
    assert_eq!(sh(&mount.path, &format!("diff -r --no-dereference -x pipe {source}/a a")), "");
    let sync = format!("rsync -a --stats {source}/a/ b/ | sed -n 's/^Number of regular files transferred: //p'");
    assert_eq!(sh(&mount.path, &sync).trim(), "129");
    assert_eq!(sh(&mount.path, &sync).trim(), "0");
    assert_eq!(sh(&mount.path, &differences.replace(" a/", " b/")), "");
    if !tree.is_plain() {
        let other = tree.elsewhere();
        assert_eq!(sh(&other.path, &differences), "");
        assert_eq!(sh(&other.path, &sync).trim(), "0");
    }
}

/// > SQLite with a rollback journal commits, rolls back, locks, and its file is whole in the bucket.
fn sqlite_keeps_its_promises(tree: &Tree) {
    let mount = tree.mount();
    let script = "
import sqlite3
db = sqlite3.connect('db.sqlite', isolation_level=None)
assert db.execute('pragma journal_mode=delete').fetchone()[0] == 'delete'
db.execute('create table t (id integer primary key, text)')
for batch in range(15):
    db.execute('begin')
    db.executemany('insert into t (text) values (?)', [(f'{batch} {i}' * 20,) for i in range(50)])
    db.execute('rollback' if batch % 5 == 4 else 'commit')
other = sqlite3.connect('db.sqlite', isolation_level=None, timeout=0)
db.execute('begin immediate')
try:
    other.execute('begin immediate')
    assert False, 'two writers'
except sqlite3.OperationalError as error:
    assert 'locked' in str(error), error
db.execute('update t set text = id where id % 3 = 0')
db.execute('commit')
assert other.execute('select count(*) from t').fetchone()[0] == 600
db.execute('delete from t where id % 2 = 0')
db.execute('vacuum')
assert db.execute('pragma integrity_check').fetchone()[0] == 'ok'
print(db.execute('select count(*) from t').fetchone()[0])
db.close()
";
    assert_eq!(python(&mount.path, script).trim(), "300");
    assert_eq!(names(&mount.path), ["db.sqlite"]);
    let copy = tree.dir.path().join("copy.sqlite");
    if tree.is_plain() {
        fs::copy(mount.at("db.sqlite"), &copy).unwrap();
    } else {
        fs::write(&copy, tree.raw().get(&tree.key("db.sqlite")).unwrap()).unwrap();
    }
    let check = "import sqlite3; db = sqlite3.connect('copy.sqlite')
print(db.execute('pragma integrity_check').fetchone()[0], db.execute('select count(*) from t').fetchone()[0])";
    assert_eq!(python(tree.dir.path(), check).trim(), "ok 300");
}

/// > A checkpoint that is written aside and renamed into place is always whole, for every reader.
fn checkpoints_are_written_and_renamed(tree: &Tree) {
    let (mount, other) = (tree.mount(), tree.elsewhere());
    for step in 0..6_u64 {
        let bytes = noise(step, [3 << 20, 10 << 20][step as usize % 2]);
        let mut tmp = File::create(mount.at("model.pt.tmp")).unwrap();
        for chunk in bytes.chunks(1 << 20) {
            tmp.write_all(chunk).unwrap();
        }
        if step % 3 != 0 {
            tmp.sync_all().unwrap();
        }
        drop(tmp);
        fs::rename(mount.at("model.pt.tmp"), mount.at("model.pt")).unwrap();
        File::open(&mount.path).unwrap().sync_all().unwrap();
        same(&fs::read(mount.at("model.pt")).unwrap(), &bytes);
        if step == 0 {
            // It had not looked there, or thought that there was nothing.
            std::thread::sleep(std::time::Duration::from_millis(1100));
        }
        same(&fs::read(other.at("model.pt")).unwrap(), &bytes);
        if !tree.is_plain() {
            same(&tree.raw().get(&tree.key("model.pt")).unwrap(), &bytes);
        }
    }
    assert_eq!(names(&mount.path), ["model.pt"]);
}

/// > A file that is appended to and flushed is followed by a reader on its node at once, and elsewhere once it is synced.
fn event_files_are_appended_to_and_followed(tree: &Tree) {
    let (mount, other) = (tree.mount(), tree.elsewhere());
    let path = mount.at("events.out.tfevents.1");
    let mut writer = OpenOptions::new().append(true).create(true).open(&path).unwrap();
    let mut reader = BufReader::new(File::open(&path).unwrap());
    let mut line = String::new();
    for step in 0..200 {
        writeln!(writer, "step {step} loss {}", 1.0 / f64::from(step + 1)).unwrap();
        line.clear();
        reader.read_line(&mut line).unwrap();
        assert!(line.starts_with(&format!("step {step} ")), "{line:?}");
        if step % 50 == 49 {
            writer.sync_data().unwrap();
            if step == 49 {
                std::thread::sleep(std::time::Duration::from_millis(1100));
            }
            let text = fs::read_to_string(other.at("events.out.tfevents.1")).unwrap();
            assert_eq!(text.lines().count(), step as usize + 1);
        }
    }
}

/// > An array in a file is mapped, filled in any order, and read by the next program that maps it.
fn arrays_are_mapped(tree: &Tree) {
    let mount = tree.mount();
    let write = "
import mmap, random, struct
random.seed(1)
n = 3 * 1024 * 1024
f = open('array', 'w+b'); f.truncate(n * 4)
m = mmap.mmap(f.fileno(), n * 4)
a = memoryview(m).cast('i')
order = list(range(0, n, 1021)); random.shuffle(order)
for i in order: a[i] = i
for i in range(1000, 200000): a[i] = -i
a.release(); m.flush(); m.close(); f.close()
";
    python(&mount.path, write);
    let read = "
import mmap, os
f = open('array', 'rb'); n = os.fstat(f.fileno()).st_size // 4
m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
a = memoryview(m).cast('i')
for i in range(0, n):
    wanted = -i if 1000 <= i < 200000 else i if i % 1021 == 0 else 0
    if a[i] != wanted: raise SystemExit(f'{i}: {a[i]} {wanted}')
print(n)
";
    assert_eq!(python(&mount.path, read).trim(), "3145728");
    assert_eq!(python(&tree.elsewhere().path, read).trim(), "3145728");
}

/// > Formats that come back to the head of the file, or fill it from the end, arrive as they were written.
fn files_are_written_out_of_order(tree: &Tree) {
    let mount = tree.mount();
    // Like HDF5: a superblock, data, an index at the end, then the superblock again and again.
    let mut wanted = vec![0; 2048];
    let file = OpenOptions::new().create_new(true).read(true).write(true).open(mount.at("data.h5")).unwrap();
    let put = |wanted: &mut Vec<u8>, at: usize, bytes: &[u8]| {
        if wanted.len() < at + bytes.len() {
            wanted.resize(at + bytes.len(), 0);
        }
        wanted[at..at + bytes.len()].copy_from_slice(bytes);
        file.write_all_at(bytes, at as u64).unwrap();
    };
    put(&mut wanted, 0, &noise(0, 2048));
    let mut random = fastrand::Rng::with_seed(3);
    for block in 0..40 {
        let at = 2048 + block * 700_000 + random.usize(..1000);
        put(&mut wanted, at, &noise(block as u64, random.usize(1..650_000)));
        if block % 8 == 7 {
            put(&mut wanted, 8, &block.to_le_bytes());
            put(&mut wanted, 96, &noise(block as u64 + 100, 600));
        }
    }
    file.set_len(wanted.len() as u64 - 100).unwrap();
    wanted.truncate(wanted.len() - 100);
    drop(file);
    same(&fs::read(mount.at("data.h5")).unwrap(), &wanted);
    // From the end to the beginning.
    let backwards = noise(9, 12 << 20);
    let file = File::create(mount.at("backwards")).unwrap();
    for start in (0..12).rev().map(|mebi| mebi << 20) {
        file.write_all_at(&backwards[start..start + (1 << 20)], start as u64).unwrap();
    }
    drop(file);
    let other = tree.elsewhere();
    same(&fs::read(other.at("data.h5")).unwrap(), &wanted);
    same(&fs::read(other.at("backwards")).unwrap(), &backwards);
}

/// > Archives are made, extended and tested in place.
fn archives_are_made(tree: &Tree) {
    let mount = tree.mount();
    let script = "
import zipfile, tarfile, io, os
z = zipfile.ZipFile('a.zip', 'w')
for i in range(30): z.writestr(f'd/{i}', os.urandom(200000))
z.close()
z = zipfile.ZipFile('a.zip', 'a'); z.writestr('late', 'x'); z.close()
z = zipfile.ZipFile('a.zip'); assert z.testzip() is None; print(len(z.namelist()))
z.extractall('out')
t = tarfile.open('a.tar.gz', 'w:gz'); t.add('out'); t.close()
print(len(tarfile.open('a.tar.gz').getnames()))
";
    assert_eq!(python(&mount.path, script), "31\n33\n");
    assert_eq!(sh(&mount.path, "gzip -t a.tar.gz; find out -type f | wc -l; rm -r out; ls"), "31\na.tar.gz\na.zip\n");
}

/// > fio finds what it wrote, at random, from several jobs.
fn fio_verifies_what_it_wrote(tree: &Tree) {
    if !have("fio") {
        return;
    }
    let mount = tree.mount();
    let common = "--size=24M --ioengine=psync --verify=crc32c --verify_fatal=1 --do_verify=1 --end_fsync=1 --output-format=terse --output=/dev/null";
    sh(&mount.path, &format!("fio --name=random --rw=randwrite --bsrange=4k-128k {common}"));
    sh(&mount.path, &format!("fio --name=jobs --numjobs=3 --rw=write --bs=64k {common}"));
    sh(&mount.path, &format!("fio --name=random --rw=randrw --bs=4k --io_size=4M {common}"));
}

/// > Random reads, writes, truncations and mappings of one file agree with a copy in memory, across closing and opening.
fn random_operations_with_maps_agree(tree: &Tree) {
    let mount = tree.mount();
    let script = "
import os, mmap, random, sys
seed = int(os.environ.get('BERTH_SEED', random.randrange(1 << 32)))
print('BERTH_SEED=%d' % seed, file=sys.stderr)
random.seed(seed)
LIMIT = 600000
f = os.open('fsx', os.O_RDWR | os.O_CREAT, 0o644)
model = bytearray()
def check(at, got):
    assert got == bytes(model[at:at + len(got)]), f'step {step}: {what} at {at}, {len(got)} bytes'
for step in range(700):
    what = random.choice(['read'] * 3 + ['write'] * 3 + ['mapread', 'mapwrite', 'truncate', 'reopen', 'sync', 'append'])
    at = random.randrange(LIMIT); length = random.randrange(1, 65536)
    if what in ('mapread', 'mapwrite'):
        if not model: continue
        at = random.randrange(len(model)); length = min(length, len(model) - at)
        m = mmap.mmap(f, 0)
        if what == 'mapread': check(at, m[at:at + length])
        else:
            data = random.randbytes(length); m[at:at + length] = data; model[at:at + length] = data
            if random.random() < .5: m.flush()
        m.close()
    elif what == 'read':
        got = os.pread(f, length, at); check(at, got)
        assert len(got) == max(0, min(length, len(model) - at)), f'step {step}: short read'
    elif what in ('write', 'append'):
        if what == 'append': at = len(model)
        data = random.randbytes(length); assert os.pwrite(f, data, at) == length
        if at > len(model): model.extend(bytes(at - len(model)))
        model[at:at + length] = data
    elif what == 'truncate':
        size = random.randrange(LIMIT); os.ftruncate(f, size)
        if size < len(model): del model[size:]
        else: model.extend(bytes(size - len(model)))
    elif what == 'sync': os.fsync(f)
    else:
        os.close(f); f = os.open('fsx', os.O_RDWR)
    assert os.fstat(f).st_size == len(model), f'step {step}: size after {what}: {os.fstat(f).st_size} {len(model)}'
os.close(f)
assert open('fsx', 'rb').read() == bytes(model)
open('../model', 'wb').write(model)
";
    for _ in 0..2 {
        let _ = fs::remove_file(mount.at("fsx"));
        python(&mount.path, script);
        let wanted = fs::read(mount.path.parent().unwrap().join("model")).unwrap();
        same(&fs::read(tree.elsewhere().at("fsx")).unwrap(), &wanted);
    }
}

/// > A directory of 100,000 entries is listed, each entry once, and its files are found and opened.
fn a_directory_has_a_hundred_thousand_entries(tree: &Tree) {
    // A disk is no proof of anything here.
    let count = if tree.is_plain() { 1000 } else { 100_000 };
    let mount = tree.mount();
    let name = |number: usize| format!("images/{number:06}.jpg");
    if tree.is_plain() {
        fs::create_dir(mount.at("images")).unwrap();
        for number in 0..count {
            fs::write(mount.at(name(number)), "image").unwrap();
        }
    } else {
        tree.raw().put_unsigned((0..count).map(|number| tree.key(&name(number))), "image");
    }
    let found = sh(
        &mount.path,
        "ls -U images | sort -u | wc -l; ls -f images | wc -l; find images -name '*7.jpg' -size 5c | wc -l",
    );
    assert_eq!(found, format!("{count}\n{}\n{}\n", count + 2, count / 10));
    for number in [0, 1, 337, count - 1] {
        assert_eq!(fs::read(mount.at(name(number))).unwrap(), b"image");
    }
    fs::write(mount.at("images/new"), "").unwrap();
    fs::remove_file(mount.at(name(5))).unwrap();
    assert_eq!(fs::read_dir(mount.at("images")).unwrap().count(), count);
}
