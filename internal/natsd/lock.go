package natsd

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// DirLock is a data directory that belongs to this process. The kernel holds the lock, so that it ends with the process, however it ends.
type DirLock struct {
	dir  string
	file *os.File
}

// errLocked is what lockFile returns where another process has the lock.
var errLocked = errors.New("locked by another process")

// LockDir creates the data directory, readable by its owner only, where it is not there, and takes it. The error names the directory and, where another process has it, that process.
func LockDir(dir string) (*DirLock, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("the data directory %q: %w", dir, err)
	}
	if err := os.MkdirAll(abs, 0o700); err != nil {
		return nil, fmt.Errorf("the data directory cannot be made: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(abs, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("the data directory cannot be used: %w", err)
	}
	if err := lockFile(f); err != nil {
		defer f.Close()
		if !errors.Is(err, errLocked) {
			return nil, fmt.Errorf("the data directory %s cannot be locked: %w", abs, err)
		}
		// The holder writes its pid right after it took the lock; in between the file may be empty, or say who had it before.
		pid, _ := io.ReadAll(io.LimitReader(f, 32))
		if n, err := strconv.Atoi(strings.TrimSpace(string(pid))); err == nil {
			return nil, fmt.Errorf("the data directory %s is in use by another tidemark process, pid %d; stop it, or choose another --data-dir", abs, n)
		}
		return nil, fmt.Errorf("the data directory %s is in use by another tidemark process; stop it, or choose another --data-dir", abs)
	}
	if err := writePID(f); err != nil {
		return nil, errors.Join(fmt.Errorf("the data directory %s cannot be written: %w", abs, err), f.Close())
	}
	return &DirLock{dir: abs, file: f}, nil
}

func writePID(f *os.File) error {
	if err := f.Truncate(0); err != nil {
		return err
	}
	_, err := f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	return err
}

// Dir is the absolute path of the directory.
func (l *DirLock) Dir() string { return l.dir }

// Release gives the directory back. It may be called more than once, by one goroutine. The file stays: removing it would let two processes lock two files of one name.
func (l *DirLock) Release() error {
	if l.file == nil {
		return nil
	}
	f := l.file
	l.file = nil
	return f.Close()
}
